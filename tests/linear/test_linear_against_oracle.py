"""Promise: loss and gradients are those of sft_loss(hidden @ weight.T + bias), in float64."""

from unittest import mock

import pytest
import torch
from backends import ON_CPU, ON_SHIM, using
from closeness import PRODUCT, assert_losses
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import (
    DTYPES,
    VIEWS,
    assert_gradients,
    build,
    expected,
    gradients,
    linear_cases,
)
from tiers import sampled

import fused_sft_loss as fsl
from fused_sft_loss.linear import products

DECLARED = 0.75
SCHEDULES = {"two passes": False, "one pass": DECLARED}
#: Tiles of one row, of a few, and of all.
CHUNKS = st.sampled_from([None, 1, 2, 3, 64])
PADDING = st.sampled_from([{}, {"rows": 40}, {"multiple": 4}, {"multiple": 64}])
PLAIN = [name for name in ON_CPU if name not in ON_SHIM]
FEWER = settings(PRODUCT, max_examples=40)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("backend", PLAIN)
@FEWER
@given(case=linear_cases(), chunk_rows=CHUNKS, padding=PADDING)
def test_losses_and_gradients_over_the_option_product(backend, schedule, case, chunk_rows, padding):
    check(backend, schedule, case, chunk_rows, padding)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("backend", sampled(ON_SHIM, ["hip-simt"]))
@settings(PRODUCT, max_examples=10)
@given(case=linear_cases(vocabularies=(33, 1100)), chunk_rows=CHUNKS, padding=PADDING)
def test_the_same_with_gpu_kernels_on_the_shim(backend, schedule, case, chunk_rows, padding):
    check(backend, schedule, case, chunk_rows, padding)


def check(backend, schedule, case, chunk_rows, padding):
    upstream = torch.full((case.labels.numel(),), DECLARED)
    if schedule == "two passes":
        upstream = torch.rand(case.labels.numel()) * 3 - 1
    want = expected(case, upstream)
    with using(backend) as name:
        losses, *grads = gradients(
            case,
            upstream,
            grad_in_forward=SCHEDULES[schedule],
            chunk_rows=chunk_rows,
            backend=name,
            **padding,
        )
    assert_losses(losses, want.rows)
    tile = products.dtype_of_products(case.weight)
    assert_gradients(case, grads, want, upstream, tile)
    assert not grads[0][want.rows.weight == 0].count_nonzero()


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(PRODUCT, max_examples=30)
@given(case=linear_cases(dtypes=(torch.bfloat16,)), chunk_rows=CHUNKS)
def test_tiles_of_16_bits_as_on_a_gpu(schedule, case, chunk_rows):
    upstream = torch.full((case.labels.numel(),), DECLARED)
    with mock.patch.object(products, "_cpu_multiplies", lambda dtype: True):
        losses, *grads = gradients(
            case, upstream, grad_in_forward=SCHEDULES[schedule], chunk_rows=chunk_rows
        )
    want = expected(case, upstream)
    assert_losses(losses, want.rows)
    assert_gradients(case, grads, want, upstream, torch.bfloat16)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(dtype, reduction, schedule):
    case = build("bsv", dtype, 2, 6, 8, 1100, 3, "float", {})
    leaf, weight, bias = (
        t.clone().requires_grad_() for t in (case.storage, case.weight, case.bias)
    )
    loss = case.call(leaf, weight, bias, reduction=reduction, grad_in_forward=SCHEDULES[schedule])
    assert loss.shape == () and loss.dtype == torch.float32
    loss.backward(torch.tensor(DECLARED))
    rows = expected(case).rows
    divisor = rows.weight.sum() if reduction == "mean" else 1.0
    upstream = torch.full((12,), DECLARED) / divisor
    want = expected(case, upstream)
    torch.testing.assert_close(loss.double(), rows.reduce(reduction), rtol=1e-6, atol=0)
    grads = (leaf.grad.flatten(0, 1), weight.grad, bias.grad)
    assert_gradients(case, grads, want, upstream, products.dtype_of_products(weight))


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_gives_the_loss_of_the_logits(view):
    """The loss of the whole logits, by sft_loss itself."""
    case = build(view, torch.float32, 2, 5, 8, 1000, 4, "float", {"z_loss": 1e-3})
    hidden = case.batch_first(case.hidden(case.storage))
    logits = hidden @ case.weight.t() + case.bias
    want = fsl.sft_loss(logits, case.labels, case.loss_mask, reduction="none", z_loss=1e-3)
    got = case.call(case.storage, case.weight, case.bias, reduction="none")
    torch.testing.assert_close(got.view_as(want), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("views", ["sbv", "transposed", "transposed sbv"])
def test_a_transposed_view_is_multiplied_without_a_copy(views, monkeypatch):
    case, seen = build(views, torch.float32, 2, 5, 8, 100, 4, "none", {}), []
    chosen = torch.Tensor.index_select
    monkeypatch.setattr(
        torch.Tensor, "index_select", lambda t, *a: seen.append(t.data_ptr()) or chosen(t, *a)
    )
    case.call(case.storage, case.weight, None)
    assert seen == [case.storage.data_ptr()]


def test_a_frozen_layer_and_frozen_hidden_states():
    """Each input that wants a gradient gets one, whatever the others want."""
    case = build("bsv", torch.float32, 2, 6, 8, 1100, 5, "float", {})
    want = gradients(case)[1:]
    for schedule in (False, True):
        for number in range(3):
            leaves = [t.clone() for t in (case.storage, case.weight, case.bias)]
            leaves[number].requires_grad_()
            loss = case.call(*leaves, reduction="sum", grad_in_forward=schedule)
            (grad,) = torch.autograd.grad(loss, leaves[number])
            torch.testing.assert_close(grad.view_as(want[number]), want[number])


def test_no_row_at_all():
    weight = torch.randn(10, 4, requires_grad=True)
    hidden, labels = torch.randn(0, 5, 4), torch.zeros(0, 5, dtype=torch.int64)
    for schedule in (False, True):
        loss = fsl.linear_sft_loss(hidden, weight, labels, grad_in_forward=schedule)
        (grad,) = torch.autograd.grad(loss, weight)
        assert loss == 0 and not grad.count_nonzero()

"""Promise: global defaults, autocast, hooks and checkpointing change no result."""

import contextlib

import pytest
import torch
from linear_cases import build
from torch.utils.checkpoint import checkpoint

import fused_sft_loss as fsl
from fused_sft_loss.linear import products

schedules = pytest.mark.parametrize("one_pass", [False, True])


def results(case, one_pass, wrap=None, **more):
    """The loss and the gradients; `wrap(step, *leaves)` calls the step."""
    leaves = [t.clone().requires_grad_() for t in (case.storage, case.weight, case.bias)]

    def step(hidden, weight, bias):
        return case.call(hidden, weight, bias, grad_in_forward=one_pass, rows=16, **more)

    loss = (wrap or (lambda step, *given: step(*given)))(step, *leaves)
    loss.sum().backward()
    return (loss.detach(), *(leaf.grad for leaf in leaves))


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "saved tensors on the CPU": torch.autograd.graph.save_on_cpu,
    "hooks that copy": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(), lambda t: t
    ),
}


@schedules
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_a_global_setting_changes_no_bit(dtype, setting, one_pass):
    case = build("bsv", dtype, 2, 8, 8, 1100, 2, "float", {"label_smoothing": 0.1})
    for reduction in ("mean", "none"):
        want = results(case, one_pass, reduction=reduction, chunk_rows=3)
        with SETTINGS[setting]():
            got = results(case, one_pass, reduction=reduction, chunk_rows=3)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def checkpointed(reentrant):
    return lambda step, *given: checkpoint(step, *given, use_reentrant=reentrant)


@schedules
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, one_pass):
    """A reentrant checkpoint computes the loss without a graph, so in two passes."""
    case = build("bsv", torch.bfloat16, 2, 8, 8, 1100, 2, "float", {})
    loss, *grads = results(case, one_pass)
    got, *got_grads = results(case, one_pass, checkpointed(reentrant))
    torch.testing.assert_close(got, loss, rtol=1e-6, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(got_grads, grads, strict=True))


@schedules
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_a_linear_layer(dtype, backward_inside, one_pass):
    """The bits of a call with the three converted by hand, and close to F.linear and sft_loss."""
    case = build("bsv", torch.float32, 2, 8, 8, 1100, 2, "float", {})
    leaves, layers, casts = (
        [t.clone().requires_grad_() for t in (case.storage, case.weight, case.bias)]
        for _ in range(3)
    )
    with torch.autocast("cpu", dtype):
        loss = case.call(*leaves, grad_in_forward=one_pass)
        logits = torch.nn.functional.linear(*layers)
        want = fsl.sft_loss(logits, case.labels, case.loss_mask)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    want.backward()
    by_hand = case.call(*(t.to(dtype) for t in casts), grad_in_forward=one_pass)
    by_hand.backward()
    assert torch.equal(loss, by_hand)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    for got, hand, layer in zip(leaves, casts, layers, strict=True):
        assert got.grad.dtype == torch.float32 and torch.equal(got.grad, hand.grad)
        size = layer.grad.abs().max().item()
        torch.testing.assert_close(got.grad, layer.grad, rtol=0, atol=0.02 * size)


def test_autocast_converts_what_a_linear_layer_converts():
    """Neither float64 nor tensors on other devices."""
    double, here = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    meta = torch.zeros(2, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        kinds = [
            t if t is None else t.dtype for t in products.as_autocast(double, here, meta, None)
        ]
    assert kinds == [torch.float64, torch.bfloat16, torch.float32, None]

"""reduction="sample_mean" without logits: the result of sft_loss, and its gradients."""

import pytest
import torch
import torch.distributed as dist
from backends import ON_CPU, using
from closeness import PRODUCT
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import assert_gradients, build, expected, linear_cases
from samples import row_factors, sample_of
from tiers import sampled

import fused_sft_loss as fsl
from bench.ranks import run_ranks
from fused_sft_loss.linear import products

MEAN = {"reduction": "sample_mean"}
SCHEDULES = {"two passes": False, "one pass": 0.75}
PLAIN = sampled(ON_CPU, [name for name in ON_CPU if "simt" not in name])
#: An empty document, positions outside all, and a legacy tail.
PACKED = torch.tensor([0, 5, 5, 7, 11, -1])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("backend", PLAIN)
@settings(PRODUCT, max_examples=20)
@given(
    case=linear_cases(views=("bsv", "sbv", "nv")),
    padding=st.sampled_from([{}, {"rows": 40}, {"multiple": 4}]),
)
def test_loss_and_gradients_over_the_option_product(backend, schedule, case, padding):
    rows = expected(case).rows
    labels = case.labels.view(-1) if case.view == "nv" else case.labels
    factors = row_factors(rows.weight, sample_of(labels, case.options.get("cu_seqlens")))
    leaves = [t.clone().requires_grad_() for t in (case.storage, case.weight)]
    bias = None if case.bias is None else case.bias.clone().requires_grad_()
    with using(backend) as name:
        loss = case.call(
            *leaves, bias, backend=name, grad_in_forward=SCHEDULES[schedule], **MEAN, **padding
        )
        loss.backward(torch.tensor(0.75))
    total = (rows.losses * factors).sum()
    size = 1 + total.abs() + rows.lse.abs().max()
    torch.testing.assert_close(loss.detach().double() / size, total / size, rtol=0, atol=1e-6)
    hidden = case.batch_first(leaves[0].grad).flatten(0, 1)
    got = hidden, leaves[1].grad, None if bias is None else bias.grad
    upstream = 0.75 * factors
    want = expected(case, upstream)
    assert_gradients(case, got, want, upstream, products.dtype_of_products(case.weight))


def packed_case():
    return build("bsv", torch.float32, 2, 6, 8, 1000, 4, "float", {})


@pytest.mark.parametrize("one_pass", [False, 0.7])
@pytest.mark.parametrize("bounds", [None, PACKED], ids=str)
def test_compiled_step_equals_the_eager_one(bounds, one_pass):
    torch._dynamo.reset()
    case = packed_case()

    def step(hidden, weight):
        return fsl.linear_sft_loss(
            hidden * 1.5, weight, case.labels, case.loss_mask, rows=12, cu_seqlens=bounds,
            grad_in_forward=one_pass, **MEAN,
        )  # fmt: skip

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (case.storage, case.weight)]
        loss = run(*leaves)
        loss.backward(torch.tensor(0.7))
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    assert all(map(torch.equal, *results))


def of_rank(one_pass):
    case, rank = packed_case(), dist.get_rank()
    hidden = case.storage.clone().requires_grad_()
    weight = case.weight.chunk(2)[rank].clone().requires_grad_()
    loss = fsl.linear_sft_loss(
        hidden, weight, case.labels, case.loss_mask, cu_seqlens=PACKED, vocab_size=1000,
        tp_group=dist.group.WORLD, grad_in_forward=one_pass, **MEAN,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("one_pass", [False, True])
def test_sharded_vocabulary_gives_the_unsharded_result(one_pass):
    ranks = run_ranks(2, of_rank, one_pass)
    case = packed_case()
    hidden, weight = (t.clone().requires_grad_() for t in (case.storage, case.weight))
    logits = hidden @ weight.t()
    want = fsl.sft_loss(logits, case.labels, case.loss_mask, cu_seqlens=PACKED, **MEAN)
    want.backward()
    for loss, of_hidden, _ in ranks:
        torch.testing.assert_close(loss, want.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(of_hidden, hidden.grad, rtol=1e-5, atol=1e-7)
    whole = torch.cat([of_weight for *_, of_weight in ranks])
    torch.testing.assert_close(whole, weight.grad, rtol=1e-5, atol=1e-7)

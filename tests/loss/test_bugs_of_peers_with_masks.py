"""Bugs that other libraries shipped, in masks, ignored labels, packing, NaN and infinity."""

import pytest
import torch
import torch.nn.functional as F
from peer_problems import INF, NAN, grad_of, problem

import fused_sft_loss as fsl


@pytest.mark.parametrize("columns", [64, 8192, 9000, 20000])
def test_first_tile_all_minus_infinity(backend, columns):
    logits, labels, _ = problem(v=20001)
    logits[..., :columns] = -INF
    labels = labels.clamp_min(columns)
    loss, grad = grad_of(logits, labels, backend=backend)
    want = F.cross_entropy(
        logits[:, :-1, columns:].flatten(0, 1).double(), (labels - columns)[:, 1:].flatten()
    )
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    assert (grad[..., :columns] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_all_tokens_masked(backend, reduction, inplace):
    logits, labels, mask = problem()
    leaf = logits.clone().requires_grad_()
    loss = fsl.sft_loss(
        leaf * 1, labels, mask * 0, backend=backend, reduction=reduction, inplace_backward=inplace
    )
    assert loss.requires_grad and (loss == 0).all()
    loss.sum().backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("poison", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_in_a_masked_row(backend, poison, dtype):
    """NaN or infinity in a masked row changes nothing, even if the upstream gradient is NaN."""
    logits, labels, mask = problem(dtype=dtype)
    mask[:, 3] = 0  # row 2 predicts position 3
    loss, grad = grad_of(logits, labels, mask, backend=backend)
    logits[:, 2] = poison
    logits[:, -1] = poison  # the last row predicts nothing
    got, got_grad = grad_of(logits, labels, mask, backend=backend)
    assert torch.equal(got, loss) and torch.equal(got_grad, grad)
    upstream = torch.ones(2, 5)
    upstream[:, 2] = NAN
    _, got_grad = grad_of(
        logits, labels, mask, backend=backend, reduction="none", upstream=upstream
    )
    assert got_grad.isfinite().all() and (got_grad[:, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("v, column", [(50, 20), (20000, 19999), (20000, 0)])
@pytest.mark.parametrize("poison", [NAN, -NAN, INF])
def test_nan_or_inf_in_a_scored_row_surfaces(backend, poison, dtype, softcap, v, column):
    logits, labels, _ = problem(v=v, dtype=dtype)
    logits[0, 1, column] = poison
    loss, grad = grad_of(logits, labels, backend=backend, softcap=softcap)
    assert loss.isnan()
    per_token, grad = grad_of(
        logits,
        labels,
        backend=backend,
        softcap=softcap,
        reduction="none",
        upstream=torch.ones(2, 5),
    )
    assert per_token.isnan().sum() == 1 and per_token[0, 1].isnan()
    assert grad[0, 1].isnan().all() and grad.isnan().sum() == v


def test_nan_with_payload_in_an_otherwise_masked_out_row(backend):
    logits = torch.full((1, 2, 100), -INF)
    bits = torch.tensor([0x7FC00001], dtype=torch.int32)
    logits[0, 0, 70] = bits.view(torch.float32)[0]
    loss, _ = grad_of(logits, torch.tensor([[0, 1]]), backend=backend)
    assert loss.isnan()


def test_ignored_rows_never_written(backend):
    """Every row of the gradient is written, in memory that held other values."""
    logits, labels, mask = problem(b=4, s=64, v=1000)
    for _ in range(3):
        junk = torch.full_like(logits, 7.0)
        del junk
        _, grad = grad_of(logits, labels, mask, backend=backend)
        scored = torch.zeros(4, 64, dtype=torch.bool)
        scored[:, :-1] = mask[:, 1:] != 0
        assert (grad[~scored] == 0).all() and (grad[scored].abs().sum(-1) > 0).all()


def test_ignored_rows_of_a_large_gradient(backend):
    """Large gradients are zeroed by another code path; it works for any alignment and width."""
    logits, labels, mask = problem(b=1, s=70, v=131_077, dtype=torch.bfloat16)
    labels = labels.clamp_max(131_071)
    mask[:, 10:] = 0
    odd = torch.empty(logits.numel() + 1, dtype=torch.bfloat16)[1:].view_as(logits).copy_(logits)
    leaf = odd.requires_grad_()
    out = fsl.sft_loss(leaf * 1, labels, mask, backend=backend, vocab_size=131_072)
    out.backward()
    scored = torch.zeros(70, dtype=torch.bool)
    scored[:-1] = mask[0, 1:] != 0
    assert (leaf.grad[0, ~scored] == 0).all() and (leaf.grad[..., 131_072:] == 0).all()
    _, small = grad_of(
        logits[:, :11], labels[:, :11], mask[:, :11], backend=backend, vocab_size=131_072
    )
    assert torch.equal(leaf.grad[0, :11], small[0])


@pytest.mark.parametrize("label", [-100, -1, 7])
def test_ignored_label_gives_a_finite_wrong_loss(backend, label):
    logits, labels, _ = problem()
    labels[labels == label] = 8
    labels[:, 2] = label
    loss, grad = grad_of(logits, labels, backend=backend, ignore_index=label)
    want = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=label
    )
    torch.testing.assert_close(loss, want)
    assert (grad[:, 1] == 0).all()


def test_context_parallel_shift_inside_the_shard(backend):
    """Shift first, then slice: a zigzag slice of the sequence gives that slice of the losses."""
    logits, labels, mask = problem(s=8)
    whole = fsl.sft_loss(logits, labels, mask, backend=backend, reduction="none")
    shifted, shifted_mask = fsl.shift_targets(labels, mask)
    for zigzag in ([0, 1, 6, 7], [2, 3, 4, 5]):
        part = fsl.sft_loss(
            logits[:, zigzag],
            shifted[:, zigzag],
            shifted_mask[:, zigzag],
            shift=False,
            backend=backend,
            reduction="none",
        )
        assert torch.equal(part, whole[:, zigzag])


def test_packing_last_token_predicts_the_next_document(backend):
    logits, labels, _ = problem(b=1, s=12)
    mask = torch.rand(1, 12) + 0.5
    cu_seqlens = torch.tensor([0, 5, 6, 12])
    packed = fsl.sft_loss(
        logits, labels, mask, cu_seqlens=cu_seqlens, backend=backend, reduction="none"
    )
    alone = [
        fsl.sft_loss(
            logits[:, a:b], labels[:, a:b], mask[:, a:b], backend=backend, reduction="none"
        )
        for a, b in [(0, 5), (5, 6), (6, 12)]
    ]
    assert torch.equal(packed, torch.cat(alone, 1))
    assert not torch.equal(
        packed, fsl.sft_loss(logits, labels, mask, backend=backend, reduction="none")
    )
    shifted, shifted_mask = fsl.shift_targets(labels, mask, cu_seqlens)
    again = fsl.sft_loss(
        logits, shifted, shifted_mask, shift=False, backend=backend, reduction="none"
    )
    assert torch.equal(packed, again)


def test_positions_outside_all_documents_are_not_scored(backend):
    logits, labels, _ = problem(b=1, s=10)
    losses = fsl.sft_loss(
        logits, labels, cu_seqlens=torch.tensor([2, 5, 8]), backend=backend, reduction="none"
    )
    assert losses[0].ne(0).tolist() == [p in (2, 3, 5, 6) for p in range(10)]


def test_mean_of_means(backend):
    """Sums and counts of unequal micro-batches give the mean over all tokens."""
    logits, labels, mask = problem(b=4, s=6)
    mask[0] = 0
    mask[0, 1] = 1
    whole, _ = grad_of(logits, labels, mask, backend=backend)
    sums = [
        fsl.sft_loss(
            logits[i : i + 1], labels[i : i + 1], mask[i : i + 1], reduction="sum", backend=backend
        )
        for i in range(4)
    ]
    total = sum(sums) / mask[:, 1:].sum()
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)


def test_scored_row_that_is_all_minus_infinity_is_nan(backend):
    logits, labels, _ = problem()
    logits[0, 0] = -INF
    loss, _ = grad_of(logits, labels, backend=backend)
    assert loss.isnan()
    assert fsl.token_metrics(logits, labels, backend=backend).lse[0, 0] == -INF


def test_target_at_minus_infinity_is_an_infinite_loss(backend):
    logits, labels, _ = problem()
    logits[0, 0, labels[0, 1]] = -INF
    loss, grad = grad_of(logits, labels, backend=backend)
    assert loss == INF and grad.isfinite().all()

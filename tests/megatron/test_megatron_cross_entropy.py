"""`vocab_parallel_cross_entropy` stands where megatron-core calls its own cross-entropy."""

import megatron_runs as runs
import pytest
import torch
import torch.nn.functional as F
from test_megatron_replaced_loss import inputs, language_model

from bench.megatron_cpu import RankError, init, run_ranks
from fused_sft_loss.megatron import vocab_parallel_cross_entropy

SEQ, BATCH = 5, 3


def batch():
    """(logits [s, b, v], labels [s, b], mask [s, b], upstream [s, b])."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(SEQ, BATCH, runs.VOCAB, generator=generator) * 3
    labels = torch.randint(0, runs.VOCAB, (SEQ, BATCH), generator=generator)
    mask = torch.randint(0, 3, (SEQ, BATCH), generator=generator) / 2
    return logits, labels, mask, torch.rand(SEQ, BATCH, generator=generator)


def exact(mask=None):
    """Losses and gradient of the whole logits in float64."""
    logits, labels, _, upstream = batch()
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
    if mask is not None:
        losses = torch.where(mask != 0, losses, 0.0)
    losses.backward(upstream.double())
    return losses.detach(), logits.grad


def sharded(tp, explicit, masked):
    """(losses, gradient of this rank's shard)."""
    parallel = init(tp)
    logits, labels, mask, upstream = batch()
    shard = logits.chunk(tp, -1)[parallel.get_tensor_model_parallel_rank()]
    shard = shard.clone().requires_grad_()
    before = shard.detach().clone()
    group = (parallel.get_tensor_model_parallel_group(),) if explicit else ()
    losses = vocab_parallel_cross_entropy(shard, labels, *group, loss_mask=mask if masked else None)
    losses.backward(upstream)
    assert torch.equal(shard.detach(), before), "Megatron's own overwrites fp32 logits"
    return losses.detach(), shard.grad


@pytest.mark.parametrize(
    ("tp", "explicit", "masked"), [(1, False, True), (2, False, False), (2, True, True)]
)
def test_losses_and_gradients(tp, explicit, masked):
    ranks = run_ranks(tp, sharded, tp, explicit, masked)
    losses, grad = exact(batch()[2] if masked else None)
    for got, _ in ranks:
        assert got.dtype == torch.float32 and got.shape == (SEQ, BATCH)
        torch.testing.assert_close(got.double(), losses, rtol=1e-6, atol=1e-7)
        assert torch.equal(got, ranks[0][0]), "every rank has the same bits"
    whole = torch.cat([shard for _, shard in ranks], -1)
    torch.testing.assert_close(whole.double(), grad, rtol=1e-5, atol=1e-7)


def in_the_slot():
    """A model's losses and gradients with Megatron's fused cross-entropy, and with ours there."""
    init(tp=2)
    from megatron.core.models.common.language_module import language_module

    model = language_model(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="native")
    arguments, targets = inputs()
    results, calls = [], []
    own = language_module.fused_vocab_parallel_cross_entropy

    def ours(*given):
        calls.append(given)
        return vocab_parallel_cross_entropy(*given)

    for operator in (own, ours):
        language_module.fused_vocab_parallel_cross_entropy = operator
        model.zero_grad()
        losses = model(*arguments, **targets)
        (losses * targets["loss_mask"]).sum().backward()
        results.append((losses.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert len(calls) == 1
    return results


@pytest.mark.long  # Megatron compiles its own operator
def test_it_fits_where_cross_entropy_fusion_impl_is_looked_up():
    """Megatron passes (logits, labels, tp_group). Its own rounds the gradient to bf16."""
    for (own, own_grads), (ours, grads) in run_ranks(2, in_the_slot):
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
        for name, grad in own_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=2e-2, atol=2e-2, msg=name)


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        ({"labels": batch()[1].t()}, ValueError, r"labels \[s, b\], got \[5, 3, 64\] and \[3, 5\]"),
        ({"labels": batch()[1].t()}, ValueError, r"pass labels\.t\(\)"),
        ({"loss_mask": batch()[2].t()}, ValueError, r"loss_mask \[s, b\].*pass loss_mask\.t\(\)"),
        ({"logits": batch()[0][0]}, ValueError, r"expected logits \[s, b, V/tp\].*got \[3, 64\]"),
        ({"labels": batch()[1].flatten()}, ValueError, r"and \[15\]"),
        ({"labels": batch()[1].tolist()}, TypeError, "expected labels to be a torch.Tensor"),
        ({"shift": True}, TypeError, r"unknown options \['shift'\]"),
        ({"reduction": "sum"}, TypeError, r"unknown options \['reduction'\]"),
    ],
)
def test_errors(changed, kind, says):
    logits, labels, *_ = batch()
    with pytest.raises(kind, match=says):
        vocab_parallel_cross_entropy(**{"logits": logits, "labels": labels, **changed})


def wrong_on_one_rank():
    rank = init(tp=2).get_tensor_model_parallel_rank()
    logits, labels, *_ = batch()
    vocab_parallel_cross_entropy(logits.chunk(2, -1)[rank], labels.t() if rank else labels)


def test_an_error_on_one_rank_reaches_the_other():
    with pytest.raises(RankError) as caught:
        run_ranks(2, wrong_on_one_rank, timeout=60)
    said = caught.value.exceptions
    assert sorted(said) == [0, 1]
    assert "pass labels.t()" in said[1][1] and "rank 1" in said[0][1]

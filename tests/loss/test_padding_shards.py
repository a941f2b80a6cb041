"""Promise: a shard may be all padding; it is left out of the softmax and gets gradient 0."""

import pytest
import torch
import torch.distributed as dist
from backends import ON_CPU, using
from cases import build, expected
from closeness import assert_losses
from tiers import sampled

import fused_sft_loss as fsl
from bench.ranks import RankError, run_ranks

RANKS, COLUMNS, SIZE = 4, 32, 40  # rank 0 and a part of rank 1 hold real ids


def sharded(names, case, placed):
    """(losses, gradient, metrics) by backend; with vocab_start if `placed`."""
    rank, results = dist.get_rank(), []
    part = case.full()[..., rank * COLUMNS : (rank + 1) * COLUMNS]
    options = {**case.options, "tp_group": dist.group.WORLD, "vocab_size": SIZE}
    if placed:
        options["vocab_start"] = rank * COLUMNS
    for name in names:
        with using(name) as backend:
            leaf = part.clone().requires_grad_()
            given = leaf, case.labels, case.loss_mask
            losses = fsl.sft_loss(*given, reduction="none", backend=backend, **options)
            losses.sum().backward()
            metrics = fsl.token_metrics(*given, backend=backend, **options)
            results.append((losses.detach(), leaf.grad, tuple(metrics)))
    return results


@pytest.mark.parametrize("placed", sampled([False, True], [True]))
def test_shards_of_padding_alone(placed):
    options = {"vocab_size": SIZE, "label_smoothing": 0.1, "softcap": 5.0}
    case = build("bsv", torch.float32, 2, 5, RANKS * COLUMNS, 0, "float", options)
    want = expected(case)
    by_rank = run_ranks(RANKS, sharded, ON_CPU, case, placed, timeout=200)
    for number in range(len(ON_CPU)):
        results = [results[number] for results in by_rank]
        for losses, _, metrics in results:
            assert_losses(losses, want)
            assert torch.equal(losses, results[0][0])
            assert torch.equal(metrics[3].flatten(), want.correct)
        grad = torch.cat([grad for _, grad, _ in results], -1).flatten(0, 1)
        torch.testing.assert_close(grad.double(), want.grad, rtol=0, atol=4e-6)
        assert (grad[:, SIZE:] == 0).all()


def first_shard_holds_all(placed):
    rank = dist.get_rank()
    start = {"vocab_start": rank * 50} if placed else {}
    logits, labels = torch.zeros(2, 4, 50), torch.zeros(2, 4, dtype=torch.int64)
    loss = fsl.sft_loss(logits, labels, tp_group=dist.group.WORLD, vocab_size=50, **start)
    return loss.item()


def test_where_the_first_shard_holds_all_ids_their_place_has_to_be_given():
    """Without vocab_start this call cannot be told from one with gathered logits."""
    with pytest.raises(RankError) as caught:
        run_ranks(2, first_shard_holds_all, False, timeout=100)
    assert len(set(caught.value.exceptions.values())) == 1
    for error, message in caught.value.exceptions.values():
        assert error == "ValueError" and "gathered logits: drop tp_group" in message
        assert "pass vocab_start=rank * 50" in message
    want = torch.tensor(50.0).log().item()
    assert run_ranks(2, first_shard_holds_all, True, timeout=100) == pytest.approx([want] * 2)

"""The benchmark's reference loss equals its definition."""

import pytest
import torch

from bench.ranks import run_ranks
from bench.reference import reference_loss, reference_loss_func

B, S, V = 2, 7, 12


def case():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(B, S, V, generator=generator)
    labels = torch.randint(0, V, (B, S), generator=generator)
    mask = (torch.rand(B, S, generator=generator) > 0.4).float()
    return logits, labels, mask


def by_hand(logits, labels, mask):
    """The definition, one position at a time, in float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b in range(B):
        for t in range(S - 1):
            if mask[b, t + 1]:
                total = total - logits[b, t].double().log_softmax(-1)[labels[b, t + 1]]
                count += 1
    return total / count


def test_it_is_the_definition():
    logits, labels, mask = case()
    x, y = (logits.clone().requires_grad_() for _ in range(2))
    loss, wanted = reference_loss(x, labels, mask), by_hand(y, labels, mask)
    loss.backward()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-7)


def test_nothing_scored_is_zero_with_a_graph():
    logits, labels, mask = case()
    logits.requires_grad_()
    loss = reference_loss(logits, labels, mask * 0)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def sharded():
    from bench.megatron_cpu import init

    parallel = init(tp=2)
    rank, size = parallel.get_tensor_model_parallel_rank(), V // 2
    logits, labels, mask = case()
    shard = logits[..., rank * size : (rank + 1) * size].clone().requires_grad_()
    loss, report = reference_loss_func(labels, mask, shard)
    loss.backward()
    assert loss.data_ptr() != report["lm loss"].data_ptr()
    return loss.detach(), shard.grad


def test_a_sharded_vocabulary_is_gathered():
    logits, labels, mask = case()
    logits.requires_grad_()
    loss = reference_loss(logits, labels, mask)
    loss.backward()
    results = run_ranks(2, sharded)
    for got, _ in results:
        torch.testing.assert_close(got, loss.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad in results], -1), logits.grad)

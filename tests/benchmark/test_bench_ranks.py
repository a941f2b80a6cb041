"""The multi-process harness returns results, reports every kind of failure, and never hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from tiers import sampled

from bench.megatron_cpu import build_model, config, init, sequence_shard, zigzag_positions
from bench.ranks import RankError, run_ranks, send_to_parent


def rank_times(factor, plus=0):
    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value)
    return dist.get_rank() * factor + plus, value.item()


def one_raises():
    if dist.get_rank() == 1:
        raise KeyError("on purpose")
    dist.all_reduce(torch.ones(1))  # waits for a rank that never comes


def one_dies():
    if dist.get_rank() == 0:
        os._exit(3)
    time.sleep(60)


def one_sleeps():
    if dist.get_rank() == 1:
        time.sleep(60)


def two_messages():
    send_to_parent(("first", dist.get_rank()))
    send_to_parent("second")


def test_results_in_rank_order():
    assert run_ranks(3, rank_times, 10, plus=1) == [(1, 3.0), (11, 3.0), (21, 3.0)]


def test_every_ranks_traceback_is_told():
    with pytest.raises(RankError) as caught:
        run_ranks(2, one_raises, timeout=30)
    assert "rank 1:\nTraceback" in str(caught.value) and "on purpose" in str(caught.value)
    assert caught.value.exceptions[1] == ("KeyError", "'on purpose'")
    assert "rank 0:" in str(caught.value) or "rank(s) [0]" in str(caught.value)


def test_a_dead_rank_is_told_and_the_others_are_ended():
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 0:\ndied with exit code 3\nrank.*1.*were killed"):
        run_ranks(2, one_dies, timeout=50)
    assert time.monotonic() - start < 40


def test_a_late_rank_is_told():
    with pytest.raises(RankError, match=r"rank\(s\) \[.*1\] did not finish within 3 s"):
        run_ranks(2, one_sleeps, timeout=3)


def test_messages_arrive_in_order():
    got = []
    run_ranks(2, two_messages, on_message=lambda rank, message: got.append((rank, message)))
    assert [m for r, m in got if r == 0] == [("first", 0), "second"]
    assert [m for r, m in got if r == 1] == [("first", 1), "second"]


def test_zigzag_positions_cover_the_sequence_once():
    assert zigzag_positions(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert zigzag_positions(8, 2, 1).tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"divisible by 2\*cp = 4, got 6"):
        zigzag_positions(6, 2, 0)


def gradients(tp, cp, groups):
    """Parameter gradients of a mean cross-entropy, averaged over context parallelism."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region as gather

    parallel = init(tp=tp, cp=cp)
    model = build_model(config(num_query_groups=groups), vocab=64, seq=16)
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, 64, (2, 2, 16), generator=generator)
    batch = (tokens, torch.arange(16).expand(2, 16), labels)
    rank = parallel.get_context_parallel_rank()
    tokens, positions, labels = (sequence_shard(x, cp, rank) for x in batch)
    logits = gather(model(tokens, positions, None))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    group = parallel.get_context_parallel_group()
    named = {n: p.grad / cp for n, p in model.named_parameters() if p.grad is not None}
    for grad in named.values():
        dist.all_reduce(grad, group=group)
    return named


@pytest.mark.parametrize("groups", sampled([4, 2], [2]))
def test_context_parallel_attention_gives_the_gradients_of_one_process(groups):
    (whole,) = run_ranks(1, gradients, 1, 1, groups)
    for shard in run_ranks(2, gradients, 1, 2, groups):
        assert shard.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(shard[name], whole[name], rtol=1e-5, atol=1e-6)

"""Promise: token_logprobs on a sharded vocabulary gives the unsharded result, by one all-gather."""

import pytest
import torch
import torch.distributed as dist
from backends import BUILT, using
from cases import build
from collectives import count_collectives
from logprob_cases import assert_figures, oracle, temperature_of
from test_sharded import shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fused_sft_loss as fsl
from bench.ranks import run_ranks

EDGES = {1: ([0],), 2: ([0, 3], [0, 500]), 3: ([0, 1, 700], [0, 400, 995])}
INF = float("inf")


def problems(starts):
    """(case, temperature): plain; padding from column 990 on; a shard of -inf."""
    for at, kind in enumerate(("none", "tokens", "number", "sequences")):
        options = {"vocab_size": 990} if at % 2 else {}
        case = build("bsv", torch.float32, 2, 5, 1000, at, "bool", options)
        case.labels.clamp_(max=989)
        if at == 2 and len(starts) > 1:
            case.storage[..., starts[-1] :] = -INF
            case.labels[case.labels >= starts[-1]] = 0
        yield case, temperature_of(kind, case.labels)


def upstreams():
    return torch.randn(2, 10, generator=torch.Generator().manual_seed(1))


def sharded_runs(jobs):
    """Per job: log-probabilities, entropies, gradient shard, collectives forward and backward."""
    results, calls = [], count_collectives()
    for name, case, temperature, starts in jobs:
        with using(name) as backend:
            part, placed = shard(case.full(), starts, dist.get_rank(), case.options)
            leaf = part.clone().requires_grad_()
            calls.clear()
            both = fsl.token_logprobs(
                leaf,
                case.labels,
                case.loss_mask,
                temperature=temperature,
                return_entropy=True,
                backend=backend,
                **placed,
            )
            forward = list(calls)
            torch.autograd.backward(both, tuple(u.view(2, 5) for u in upstreams()))
            backward = calls[len(forward) :]
        results.append((*(x.detach() for x in both), leaf.grad, forward, backward))
    return results


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sharded_log_probs_equal_unsharded(ranks):
    jobs = [
        (name, *problem, starts)
        for name in BUILT
        for starts in EDGES[ranks]
        for problem in problems(starts)
    ]
    by_rank = run_ranks(ranks, sharded_runs, jobs)
    for i, (_, case, temperature, _) in enumerate(jobs):
        want = oracle(case, temperature, *upstreams())
        results = [results[i] for results in by_rank]
        assert_figures(*results[0][:2], want, (2, 5))
        for other in results[1:]:  # the same bits on every rank
            assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])
        grad = torch.cat([result[2] for result in results], -1).view(10, -1)
        torch.testing.assert_close(grad.double(), want.grad, rtol=0, atol=1e-5)
        for result in results:
            told = ["all_gather_object", "all_gather"] if ranks > 1 else []
            assert result[3] == told and result[4] == []


def wrong_calls(kinds):
    """The message of each kind of call, which is wrong on rank 1 alone."""
    told = []
    for kind in kinds:
        labels = torch.randint(0, 100, (2, 4), generator=torch.Generator().manual_seed(0))
        given = {"temperature": torch.ones(2, 4), "return_entropy": True}
        if dist.get_rank() == 1:
            changed = given["temperature"].clone()
            changed[1, 2] = {"value": 0.0, "other": 2.0}.get(kind, 1.0)
            given["temperature"] = changed
            given |= {
                "number": {"temperature": -1.0},
                "shape": {"temperature": torch.ones(2)},
                "entropy": {"return_entropy": False},
                "one": {"temperature": 0.5},
            }.get(kind, {})
        with pytest.raises((ValueError, TypeError)) as error:
            fsl.token_logprobs(torch.randn(2, 4, 50), labels, tp_group=dist.group.WORLD, **given)
        told.append(str(error.value))
    return told


def test_all_ranks_raise_before_the_collective_if_one_call_is_wrong():
    kinds = {
        "value": ("got 0.0 at temperature[1, 2]", "rank 1, which shares"),
        "other": ("expected the same call", "other temperature on ranks"),
        "number": ("temperature positive", "rank 1, which shares"),
        "shape": ("labels' shape [2, 4], got [2]", "rank 1, which shares"),
        "entropy": ("return_entropy=False", "other call"),
        "one": ("temperature of tokens", "other call"),
    }
    by_rank = run_ranks(2, wrong_calls, list(kinds))
    for at, (kind, (everywhere, of_others)) in enumerate(kinds.items()):
        assert all(everywhere in told[at] for told in by_rank), (kind, [t[at] for t in by_rank])
        assert of_others in by_rank[0][at], (kind, by_rank[0][at])


def dtensor_runs():
    """On logits of 11 columns as torch.chunk cuts them: figures and the whole gradient."""
    mesh = init_device_mesh("cpu", (3,))
    case = build("bsv", torch.float32, 2, 5, 11, 0, "bool", {})
    temperature = temperature_of("tokens", case.labels)
    leaf = distribute_tensor(case.full(), mesh, [Shard(2)]).requires_grad_()
    both = fsl.token_logprobs(
        leaf, case.labels, case.loss_mask, temperature=temperature, return_entropy=True
    )
    torch.autograd.backward(both, tuple(u.view(2, 5) for u in upstreams()))
    assert isinstance(leaf.grad, DTensor) and leaf.grad.placements == leaf.placements
    with pytest.raises(TypeError, match="expected temperature to be a plain tensor"):
        fsl.token_logprobs(
            leaf, case.labels, temperature=DTensor.from_local(temperature, mesh, [Replicate()])
        )
    return *(x.detach() for x in both), leaf.grad.full_tensor()


def test_dtensor_logits():
    case = build("bsv", torch.float32, 2, 5, 11, 0, "bool", {})
    temperature = temperature_of("tokens", case.labels)
    want = oracle(case, temperature, *upstreams())
    for log_probs, entropies, grad in run_ranks(3, dtensor_runs):
        assert_figures(log_probs, entropies, want, (2, 5))
        torch.testing.assert_close(grad.view(10, -1).double(), want.grad, rtol=0, atol=1e-5)

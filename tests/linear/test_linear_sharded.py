"""Promise: a layer split over ranks gives the unsharded loss and gradients."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from closeness import assert_losses
from collectives import count_collectives
from linear_cases import LinearCase, assert_gradients, build, expected
from tiers import sampled

import fused_sft_loss as fsl
from bench.ranks import run_ranks
from fused_sft_loss.linear import tiles

V, H = 1000, 8
EDGES = {  # first column of each rank
    "equal": {2: [0, 500], 4: [0, 250, 500, 750]},
    "uneven": {2: [0, 3], 4: [0, 1, 700, 999]},
}
OPTIONS = (
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "logit_scale": 1.5},
    {"vocab_size": 240},  # with equal shards, all but the first hold padding alone
    {"shift": False, "ignore_index": 0},
)


class Job(NamedTuple):
    case: LinearCase
    starts: list
    parts: bool  # sequence_parallel
    more: dict


def placed(job):
    """This rank's columns, and the options that place them."""
    rank, edges = dist.get_rank(), [*job.starts, V]
    size = job.case.options.get("vocab_size", V)
    return slice(edges[rank], edges[rank + 1]), {
        "tp_group": dist.group.WORLD,
        "vocab_size": size,
        "vocab_start": job.starts[rank],
    }


def part_of(job, whole):
    """This rank's part of the sequence."""
    if not job.parts:
        return whole
    dim = {"bsv": 1, "sbv": 0, "nv": 1}[job.case.view]  # the storage of "nv" is [1, n, h]
    return whole.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def run(job):
    """(losses, gradients of hidden's part, weight's and bias's shard)."""
    case = job.case
    columns, where = placed(job)
    leaf = part_of(job, case.storage).clone().requires_grad_()
    weight, bias = (t[columns].clone().requires_grad_() for t in (case.weight, case.bias))
    hidden = leaf.flatten(0, 1) if case.view == "nv" else leaf
    flat = case.view == "nv"
    labels = case.labels[0] if flat else case.labels
    mask = case.loss_mask[0] if flat else case.loss_mask
    layout = {"layout": "sbv"} if case.view == "sbv" else {}
    options = {**case.options, **layout, **where, **job.more, "sequence_parallel": job.parts}
    yield fsl.linear_sft_loss(hidden, weight, labels, mask, bias=bias, **options)
    yield leaf.grad, weight.grad, bias.grad


def runs(jobs):
    """Per job: (losses, gradients, collectives of forward, of backward)."""
    calls, results = count_collectives(), []
    for job in jobs:
        calls.clear()
        steps = run(job)
        losses = next(steps)
        forward = list(calls)
        losses.sum().backward()
        results.append((losses.detach(), next(steps), forward, calls[len(forward) :]))
    return results


def check(job, results, views=1):
    """All ranks' results of a job against float64."""
    want = expected(job.case)
    for losses, *_ in results:
        assert_losses(losses.flatten(), want.rows)
        assert torch.equal(losses, results[0][0])
    dim = {"bsv": 1, "sbv": 0, "nv": 1}[job.case.view]
    parts = [grads[0] for _, grads, *_ in results]
    whole = torch.cat(parts, dim) if job.parts else parts[0]
    if not job.parts:
        assert all(torch.equal(part, whole) for part in parts)
    hidden = job.case.batch_first(whole).flatten(0, 1)
    weight, bias = (torch.cat([grads[i] for _, grads, *_ in results]) for i in (1, 2))
    upstream = torch.ones(hidden.shape[0])
    assert_gradients(job.case, (hidden, weight, bias), want, upstream, torch.float32)


@pytest.mark.parametrize("ranks", sampled([2, 4], [2]))
def test_sharded_equals_unsharded(ranks):
    jobs = []
    for starts in EDGES.values():
        for number, options in enumerate(OPTIONS):
            for one_pass in (False, True):
                for parts, view in ((False, "bsv"), (True, "bsv"), (True, "sbv"), (True, "nv")):
                    case = build(view, torch.float32, 2, 8, H, V, number, "float", options)
                    more = {"chunk_rows": 3, "grad_in_forward": one_pass, "reduction": "none"}
                    jobs.append(Job(case, starts[ranks], parts, more))
    by_rank = run_ranks(ranks, runs, jobs, timeout=300)
    for number, job in enumerate(jobs):
        results = [results[number] for results in by_rank]
        check(job, results)
        chunks = -(-int((expected(job.case).rows.weight != 0).sum()) // 3)
        statistics = chunks if job.more["grad_in_forward"] else 1
        gathers = statistics + job.parts
        for *_, forward, backward in results:
            # On a CPU the ranks first check that they make the same call.
            assert forward == ["all_gather_object"] + ["all_gather"] * gathers
            assert backward == ["reduce_scatter_tensor" if job.parts else "all_reduce"]


def runs_with_small_tiles(jobs):
    tiles.CPU_CHUNK = 4 * 2000
    return runs(jobs)


def test_trap_uneven_shards_whose_budget_gives_other_chunks():
    """A budget of bytes holds 4 rows of 500 columns, or 666 rows of 3. The ranks exchange
    statistics chunk by chunk, so they must cut the rows alike."""
    case = build("bsv", torch.float32, 2, 8, H, V, 1, "none", {})
    more = {"reduction": "none"}
    jobs = [Job(case, [0, 3], False, {**more, "grad_in_forward": on}) for on in (True, False)]
    by_rank = run_ranks(2, runs_with_small_tiles, jobs, timeout=60)
    for number, job in enumerate(jobs):
        check(job, [results[number] for results in by_rank])


def test_a_batch_without_scored_tokens_runs_no_collective_but_the_check():
    case = build("bsv", torch.float32, 2, 8, H, V, 1, "empty", {})
    jobs = [
        Job(case, [0, 500], False, {"grad_in_forward": one_pass, "reduction": "mean"})
        for one_pass in (False, True)
    ]
    for results in run_ranks(2, runs, jobs, timeout=60):
        for loss, grads, forward, backward in results:
            assert loss == 0 and not any(grad.count_nonzero() for grad in grads)
            assert forward == ["all_gather_object"] and backward == []


def test_another_upstream_gradient_than_declared():
    case = build("bsv", torch.float32, 2, 8, H, V, 1, "float", {})
    more = {"grad_in_forward": 0.25, "reduction": "none", "chunk_rows": 2}
    jobs = [Job(case, [0, 500], parts, more) for parts in (False, True)]
    by_rank = run_ranks(2, runs, jobs, timeout=60)
    for number, job in enumerate(jobs):
        check(job, [results[number] for results in by_rank])


def frozen(case):
    """Only the hidden states want a gradient, or only the weight."""
    found = []
    for one_pass in (False, True):
        for wants_hidden in (False, True):
            hidden = case.storage.clone().requires_grad_(wants_hidden)
            columns, where = placed(Job(case, [0, 500], False, {}))
            weight = case.weight[columns].clone().requires_grad_(not wants_hidden)
            loss = fsl.linear_sft_loss(
                hidden, weight, case.labels, case.loss_mask, reduction="sum",
                grad_in_forward=one_pass, **where,
            )  # fmt: skip
            (grad,) = torch.autograd.grad(loss, hidden if wants_hidden else weight)
            found.append(grad)
    return found


def test_one_of_both_is_frozen():
    case = build("bsv", torch.float32, 2, 8, H, V, 1, "float", {}, with_bias=False)
    want = expected(case)
    for rank, (weight, hidden, *again) in enumerate(run_ranks(2, frozen, case, timeout=60)):
        for got_weight, got_hidden in ((weight, hidden), again):
            mine = want.weight[rank * 500 : rank * 500 + 500]
            torch.testing.assert_close(got_weight.double(), mine, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                got_hidden.flatten(0, 1).double(), want.hidden, rtol=1e-5, atol=1e-4
            )


def compiled(case):
    columns, where = placed(Job(case, [0, 500], False, {}))
    results = []
    for one_pass in (False, True):

        def step(hidden, weight, on=one_pass):
            return fsl.linear_sft_loss(
                hidden * 1.0, weight, case.labels, case.loss_mask, rows=16, grad_in_forward=on,
                **where,
            )  # fmt: skip

        for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaves = [t.clone().requires_grad_() for t in (case.storage, case.weight[columns])]
            loss = run(*leaves)
            loss.backward()
            results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    return results


def test_compiled_and_sharded():
    case = build("bsv", torch.float32, 2, 8, H, V, 1, "float", {}, with_bias=False)
    for plain, traced, *others in run_ranks(2, compiled, case, timeout=100):
        for want, got in ((plain, traced), tuple(others)):
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))

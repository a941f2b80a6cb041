"""Promise: a vocabulary split over ranks gives the unsharded result with one all-gather."""

import pytest
import torch
import torch.distributed as dist
from backends import ON_CPU
from cases import build, expected
from closeness import assert_losses
from sharded_calls import OPTIONS, run_jobs, shard
from tiers import sampled

import fused_sft_loss as fsl
from bench.ranks import RankError, run_ranks

EDGES = {  # first column of each rank, in a vocabulary of 1000 columns
    "equal": {1: [0], 2: [0, 500], 4: [0, 250, 500, 750]},
    "uneven": {1: [0], 2: [0, 3], 4: [0, 1, 700, 999]},
}


KINDS = ("plain", "a shard of -inf", "right predictions")


def special(case, kind, starts):
    """Fill the last shard with -inf, put a NaN into it, or make the targets the maxima."""
    if kind == "a shard of -inf":
        last = starts[-1]
        case.storage[..., last:] = -float("inf")
        case.labels[case.labels >= last] = 0
    elif kind == "NaN in one shard":
        case.storage[0, 1, starts[-1]] = float("nan")
    elif kind == "right predictions":
        rows = case.storage if not case.options.get("shift", True) else case.storage[:, :-1]
        labels = case.labels if not case.options.get("shift", True) else case.labels[:, 1:]
        rows.scatter_(-1, labels.clamp_min(0).unsqueeze(-1), 40.0)
    return case


@pytest.mark.parametrize("ranks", sampled([1, 2, 4], [1, 2]))
def test_sharded_equals_unsharded(ranks):
    jobs = []
    for name in ON_CPU:
        for starts in EDGES.values():
            for i, options in enumerate(OPTIONS):
                for kind in KINDS if ranks > 1 and i == 0 else KINDS[:1]:
                    case = build("bsv", torch.float32, 2, 5, 1000, i, "float", options)
                    case.labels.clamp_(max=996)
                    jobs.append((name, special(case, kind, starts[ranks]), starts[ranks], options))
    by_rank = run_ranks(ranks, run_jobs, jobs)
    for i, (name, case, _, options) in enumerate(jobs):
        want = expected(case)
        results = [results[i] for results in by_rank]
        assert_losses(results[0][0], want)
        for other in results[1:]:  # the same bits on every rank
            assert torch.equal(other[0], results[0][0])
            for a, b in zip(other[2], results[0][2], strict=True):
                assert torch.equal(a, b)
        grad = torch.cat([result[1] for result in results], -1).view(-1, 1000)
        torch.testing.assert_close(grad.double(), want.grad, rtol=0, atol=4e-6)
        correct = results[0][2][3].flatten()
        assert torch.equal(correct, want.correct)
        torch.testing.assert_close(
            results[0][2][4].flatten().double(),
            torch.where(want.weight != 0, want.entropy, 0.0),
            rtol=0,
            atol=2e-5,
        )
        for result in results:
            # On a CPU the ranks first check that they make the same call.
            told = ["all_gather_object", "all_gather"] if ranks > 1 else []
            assert result[3] == told, (name, options)
            assert result[4] == []


def test_nan_in_one_shard_reaches_every_rank():
    case = special(
        build("bsv", torch.float32, 2, 5, 1000, 1, "none", {}), "NaN in one shard", [0, 500]
    )
    case.labels.clamp_(min=0)
    jobs = [(name, case, [0, 500], {}) for name in ON_CPU]
    for results in run_ranks(2, run_jobs, jobs):
        for losses, grad, *_ in results:
            assert losses.isnan().nonzero().tolist() == [[0, 1]]
            assert grad[0, 1].isnan().all() and grad.isnan().sum() == 500


@pytest.mark.long
def test_sixteen_bit_gradient_is_that_of_the_fp32_shard_rounded_once():
    for dtype in (torch.bfloat16, torch.float16):
        case = build("bsv", dtype, 2, 5, 1000, 2, "float", {"label_smoothing": 0.1})
        wide = build("bsv", dtype, 2, 5, 1000, 2, "float", {"label_smoothing": 0.1})
        wide.storage = wide.storage.float()
        jobs = [(name, c, [0, 500], c.options) for name in ON_CPU for c in (case, wide)]
        for results in run_ranks(2, run_jobs, jobs):
            for narrow, full in zip(results[::2], results[1::2], strict=True):
                assert torch.equal(narrow[0], full[0])
                assert torch.equal(narrow[1], full[1].to(dtype))


def misuse(kind):
    """One wrong call on every rank, or on rank 1 only."""
    rank = dist.get_rank()
    labels = torch.randint(0, 50, (2, 4))
    options = {
        "gathered": {"vocab_size": 100},
        "gap": {"vocab_size": 100, "vocab_start": [0, 60][rank]},
        "overlap": {"vocab_size": 100, "vocab_start": [0, 40][rank]},
        "too few": {"vocab_size": 150, "vocab_start": [0, 50][rank]},
        "sizes differ": {"vocab_size": [100, 99][rank], "vocab_start": [0, 50][rank]},
        "no vocab_size": {"vocab_start": [0, 50][rank]},
        "one read": {"grad_in_forward": True},
    }[kind]
    width = 100 if kind == "gathered" else 50
    fsl.sft_loss(torch.randn(2, 4, width), labels, tp_group=dist.group.WORLD, **options)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("gathered", "gathered logits: drop tp_group"),
        ("gap", "tile"),
        ("overlap", "tile"),
        ("too few", "tile"),
        ("sizes differ", "tile"),
        ("no vocab_size", "vocab_size and vocab_start"),
        ("one read", "no grad_in_forward with a vocabulary sharded"),
    ],
)
def test_shards_that_do_not_add_up_are_an_error_on_every_rank(kind, words):
    with pytest.raises(RankError) as caught:
        run_ranks(2, misuse, kind, timeout=60)
    assert set(caught.value.exceptions) == {0, 1}
    for error, message in caught.value.exceptions.values():
        assert error == "ValueError" and words in message


def compiled_run(case):
    part, placed = shard(case.full(), [0, 500], dist.get_rank(), {})
    leaf = part.clone().requires_grad_()

    def step(x):
        return fsl.sft_loss(x * 1.0, case.labels, case.loss_mask, **placed)

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(leaf)
    loss.backward()
    return loss.detach(), leaf.grad, step(leaf).detach()


def test_compiled_and_sharded():
    case = build("bsv", torch.float32, 2, 5, 1000, 2, "float", {})
    want = expected(case)
    results = run_ranks(2, compiled_run, case)
    for loss, _, eager_loss in results:
        assert torch.equal(loss, eager_loss)
        torch.testing.assert_close(loss.double(), want.reduce("mean"), rtol=1e-6, atol=0)
    grad = torch.cat([grad for _, grad, _ in results], -1).view(-1, 1000)
    torch.testing.assert_close(grad.double(), want.grad / want.weight.sum(), rtol=0, atol=1e-6)

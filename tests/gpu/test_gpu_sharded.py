"""A vocabulary split over ranks that share one GPU. gloo exchanges the CUDA tensors.

NCCL refuses two ranks on one device. With several devices tests/gpu/test_gpu.py uses it.
"""

import pytest
import torch
from cases import build, expected
from closeness import assert_losses
from sharded_calls import OPTIONS, run_jobs

from bench.ranks import run_ranks
from fused_sft_loss.backends import selection

COLUMNS, ROWS = 1000, 5
BOTH = "cpu:gloo,cuda:gloo"


def check(ranks, backends, device, dtype):
    """Losses, gradients and metrics of every rank, beside the oracle's."""
    width = COLUMNS // ranks
    starts = [rank * width for rank in range(ranks)]
    jobs = []
    for name in backends:
        for seed, options in enumerate(OPTIONS):
            case = build("bsv", dtype, 2, ROWS, COLUMNS, seed, "float", options)
            case.labels.clamp_(max=996)
            jobs.append((name, case, starts, options))
    by_rank = run_ranks(ranks, run_jobs, jobs, device, backend=BOTH)
    for job, results in zip(jobs, zip(*by_rank, strict=True), strict=True):
        _, case, _, options = job
        want = expected(case)
        assert_losses(results[0].losses, want)
        for other in results[1:]:  # the same bits on every rank
            assert torch.equal(other.losses, results[0].losses)
            pairs = zip(other.metrics, results[0].metrics, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        grad = torch.cat([result.grad for result in results], -1).view(-1, COLUMNS)
        rounded = 0.0 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(grad.double(), want.grad, rtol=rounded, atol=4e-6)
        assert all(not result.backward for result in results), options


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_a_vocabulary_on_one_device(ranks, dtype):
    names = ("triton", "cuda", "hip")
    usable = [name for name in names if selection.reason_against(name, "cuda") is None]
    assert usable
    check(ranks, usable, "cuda", dtype)


def test_the_check_of_ranks_that_share_a_device_runs_on_a_cpu():
    check(2, ["eager"], "cpu", torch.bfloat16)

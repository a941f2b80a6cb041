"""Promise: the same inputs give the same bits, run after run, with any number of threads."""

import pytest
import torch
from backends import ON_CPU, using
from cases import build, run

from fused_sft_loss.backends import selection
from fused_sft_loss.rowmath import RowMath

NATIVE = [name for name in ON_CPU if name.startswith("cpu-")]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ON_CPU)
def test_run_after_run(name):
    case = build("bsv", torch.bfloat16, 2, 6, 50257, 0, "float", {"label_smoothing": 0.1})
    with using(name) as backend:
        losses, grad = run(case, backend)
        for _ in range(3):
            again, grad_again = run(case, backend)
            assert torch.equal(again, losses) and torch.equal(grad_again, grad)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("b, s, v", [(1, 2, 262144), (1, 16, 50257), (3, 40, 9001), (1, 16, 8193)])
def test_threads_over_rows_and_over_the_vocabulary(name, threads, b, s, v):
    """With fewer than four scored rows per thread, threads share rows; else each thread gets whole
    rows. The bits are the same."""
    case = build("bsv", torch.bfloat16, b, s, v, 0, "float", {"label_smoothing": 0.1})
    results = []
    with using(name) as backend:
        for count in (1, 2, 3, 7):
            threads(count)
            results.append(run(case, backend))
    for losses, grad in results[1:]:
        assert torch.equal(losses, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("name", NATIVE)
def test_statistics_of_a_cut_row(name, threads):
    """Compares the sums themselves, because a loss in fp32 would hide their last bits."""
    math = RowMath(0, 100_000)
    logits, target = torch.randn(1, 12, 100_000) * 4, torch.randint(0, 100_000, (12,))
    results = []
    with using(name) as backend:
        for count in (1, 8):
            threads(count)
            results.append(
                selection.load(backend).row_stats(logits, target, torch.ones(12), math, 6)
            )
    assert torch.equal(*results)


@pytest.mark.skipif(len(NATIVE) < 3, reason="needs two instruction sets with FMA on this processor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_avx2_and_avx512_agree_to_the_bit(dtype):
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0}
    case = build("offset", dtype, 2, 6, 50257, 0, "float", options)
    results = []
    for name in NATIVE[:2]:
        with using(name) as backend:
            results.append(run(case, backend))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.skipif(not NATIVE, reason="the native module is not built")
def test_threading_borrows_torchs_runtime():
    assert selection.load("cpu").build_info()["threading"] == "OpenMP runtime of this process"

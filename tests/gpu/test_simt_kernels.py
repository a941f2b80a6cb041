"""The CUDA and HIP kernels on the shim: any thread order, rows split or not, sanitizers."""

import shutil

import pytest
from simt_programs import run_program
from tiers import sampled

from bench.without_gpu.simt import build as build_shim

if reason := build_shim.missing():
    pytest.skip(f"the SIMT shim cannot be compiled: {reason}", allow_module_level=True)

SOURCE = build_shim.SHIM / "passes.cu"
FEW, MANY = "0", "132"  # multiprocessors: with 0 no row is split, with 132 every row is


def build(folder, warp, flags=(), sources=build_shim.ROOT / "csrc/gpu"):
    return build_shim.compile_program(
        [SOURCE, *sorted(sources.glob("*.cu"))], folder / f"passes{warp}", warp, flags
    )


@pytest.fixture(scope="module", params=sampled([32, 64], [32]))
def passes(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("passes"), request.param)


def run(program, multiprocessors, seed):
    return run_program([program, multiprocessors, seed])


def bits(program, multiprocessors, seed):
    done = run(program, multiprocessors, seed)
    assert done.returncode == 0, done.stderr
    assert "another" not in done.stdout, done.stdout
    return done.stdout


def test_same_bits_in_whatever_order_lanes_run_and_rows_are_shared_out(passes):
    expected = bits(passes, FEW, 0)
    assert len(expected.splitlines()) == 2 + 6 + 6 + 6 + 3 + 2
    for seed in range(3):
        assert bits(passes, MANY, seed) == expected
    assert bits(passes, FEW, 1) == expected


@pytest.mark.long
@pytest.mark.parametrize("warp", [32, 64])
def test_address_and_undefined_behaviour_sanitizers_find_nothing(tmp_path, warp):
    program = build(tmp_path, warp, build_shim.ASAN)
    for multiprocessors in (FEW, MANY):
        done = run(program, multiprocessors, 1)
        assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.long
def test_thread_sanitizer_finds_no_race(tmp_path):
    program = build(tmp_path, 32, build_shim.TSAN)
    for multiprocessors in (FEW, MANY):
        done = run(program, multiprocessors, 1)
        assert done.returncode == 0 and "data race" not in done.stderr, done.stderr


def program_without(barrier, name, folder):
    """Build the passes for ThreadSanitizer from sources without one barrier of a file."""
    shutil.copytree(build_shim.ROOT / "csrc", folder / "csrc")
    sources = folder / "csrc/gpu"
    text = (sources / name).read_text()
    assert text.count(barrier) == 1
    (sources / name).write_text(text.replace(barrier, "\n"))
    return build(folder, 32, build_shim.TSAN, sources)


@pytest.mark.long
@pytest.mark.parametrize(
    ("barrier", "name"),
    [
        ("\n  barrier();", "block.cuh"),  # in block_reduce
        # One thread overwrites the target's gradient, which another thread has written.
        ("\n    barrier();", "row_stats_grad.cuh"),
    ],
)
def test_thread_sanitizer_names_a_missing_barrier(tmp_path, barrier, name):
    """Proves that the test above can fail."""
    done = run(program_without(barrier, name, tmp_path), FEW, 1)
    assert done.returncode and "data race" in done.stderr
    assert name in done.stderr

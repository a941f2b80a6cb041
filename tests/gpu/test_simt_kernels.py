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
    capped = 4 if passes.name == "passes64" else 6  # on AMD a softcap takes two reads
    assert len(expected.splitlines()) == 2 + 6 + 2 * capped + 3 + 2 + 2 + 6
    for seed in range(3):
        assert bits(passes, MANY, seed) == expected
    assert bits(passes, FEW, 1) == expected


DIVISIONS = """
#include <cstdio>
#include <cstdlib>

#include "rows.cuh"

int main() {
  const int64_t most = 0x7fffffff;
  int64_t wrong = 0, tried = 0;
  const auto check = [&](int64_t by) {
    const fsl::Divisor divisor(by);
    const auto one = [&](int64_t n) {
      if (n < 0 || n > most) return;
      const fsl::gpu::Divided got = fsl::gpu::divide(static_cast<uint32_t>(n), divisor);
      wrong += got.quotient != n / by || got.rest != n % by;
      ++tried;
    };
    for (int i = 0; i < 64; ++i) {  // on each side of a multiple a quotient may be wrong by one
      const int64_t multiple = (most >> i % 32) / by * by - (i / 32) * by;
      for (int64_t near : {multiple - 1, multiple, multiple + 1}) one(near);
      one(std::rand());
    }
  };
  for (int bit = 0; bit <= 31; ++bit)
    for (int64_t by : {(1LL << bit) - 1, 1LL << bit, (1LL << bit) + 1})
      if (by > 0 && by <= 1LL << 31) check(by);
  for (int i = 0; i < 100000; ++i) check(1 + std::rand() % most);
  for (int64_t by : {3LL, 5LL, 7LL, 10LL, 641LL, 4097LL, 32767LL, 131072LL, 6700417LL}) check(by);
  std::printf("%lld of %lld\\n", static_cast<long long>(wrong), static_cast<long long>(tried));
}
"""


def test_division_by_multiplication_is_exact(tmp_path):
    source = tmp_path / "divisions.cu"
    source.write_text(DIVISIONS)
    done = run_program([build_shim.compile_program([source], tmp_path / "divisions", 32)])
    wrong, tried = map(int, done.stdout.split(" of "))
    assert wrong == 0 and tried > 1e7


ROUNDS = """
#include <cstdio>

#include "launch_table.h"

int main() {
  fsl::gpu::Line line{0, 0, 0, 0, 0, 4, ""};
  for (int64_t rows : {0, 7, 99, 500, 1600, 4096, 1000000})
    std::printf("%u ", fsl::gpu::clusters_for(line, rows, 99));
  line.rounds = 0;
  std::printf("%u", fsl::gpu::clusters_for(line, 4096, 99));
}
"""


def test_clusters_take_eight_rows_or_more_in_whole_rounds(tmp_path):
    source = tmp_path / "rounds.cu"
    source.write_text(ROUNDS)
    done = run_program([build_shim.compile_program([source], tmp_path / "rounds", 32)])
    assert done.stdout.split() == ["0", "7", "99", "99", "198", "396", "396", "4096"]


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


def racing_program(words, other, name, folder):
    """Build the passes for ThreadSanitizer from sources with other words in one place of a file."""
    shutil.copytree(build_shim.ROOT / "csrc", folder / "csrc")
    sources = folder / "csrc/gpu"
    text = (sources / name).read_text()
    assert text.count(words) == 1
    (sources / name).write_text(text.replace(words, other))
    return build(folder, 32, build_shim.TSAN, sources)


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "other", "name"),
    [
        ("\n  barrier();", "\n", "block.cuh"),  # in block_reduce
        # One thread overwrites the target's gradient, which another thread has written.
        ("\n    barrier();", "\n", "row_stats_grad.cuh"),
        # A block writes the statistics of its next row while others still read those of this one.
        ("turn % 2 * 4", "turn * 0", "row_stats_grad.cuh"),
    ],
)
def test_thread_sanitizer_names_a_race(tmp_path, words, other, name):
    """Proves that the test above can fail."""
    done = run(racing_program(words, other, name, tmp_path), FEW, 1)
    assert done.returncode and "data race" in done.stderr
    assert name in done.stderr

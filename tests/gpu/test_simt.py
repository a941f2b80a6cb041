"""Test the SIMT shim: correct kernels compute; each broken kernel gets an error that says why."""

import math
import re

import pytest
import torch
from simt_programs import run_program

from bench.without_gpu.simt import build as build_shim

if reason := build_shim.missing():
    pytest.skip(f"the SIMT shim cannot be compiled: {reason}", allow_module_level=True)

SOURCE = build_shim.SHIM / "checks.cu"


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """checks.cu, compiled once per warp width and set of flags."""
    folder, built = tmp_path_factory.mktemp("simt"), {}

    def program(warp, flags=()):
        if (warp, flags) not in built:
            output = folder / f"checks{len(built)}"
            built[warp, flags] = build_shim.compile_program([SOURCE], output, warp, flags)
        return built[warp, flags]

    return program


def run(program, name, kind=0, seed=0):
    return run_program([program, name, kind, seed])


def numbers(program, name, kind=0, seed=0):
    done = run(program, name, kind, seed)
    assert done.returncode == 0 and "error" not in done.stdout, done.stdout + done.stderr
    return [int(word) for word in done.stdout.split()]


def error(program, name, kind=0, seed=0):
    done = run(program, name, kind, seed)
    assert done.returncode == 0 and done.stdout.startswith("error: "), done.stdout + done.stderr
    return done.stdout.removeprefix("error: ")


@pytest.fixture(params=[32, 64])
def warp(request):
    return request.param


@pytest.fixture
def plain(programs, warp):
    return programs(warp)


def block_sums(warp):
    threads = 4 * warp
    return [block * threads + sum(range(threads)) for block in range(3) for _ in range(threads)]


@pytest.mark.parametrize("seed", range(4))
def test_sums_over_warps_and_blocks(plain, warp, seed):
    assert numbers(plain, "sums", 0, seed) == block_sums(warp)


def test_launches_again_after_an_error_and_on_another_thread(plain, warp):
    assert numbers(plain, "again") == block_sums(warp)


def test_blocks_and_warps_may_exit_together(plain, warp):
    out = numbers(plain, "blocks_leave")
    assert out == [-7 if thread // warp == 1 else warp for thread in range(4 * warp)]


def test_shared_memory_starts_as_nan_in_every_block(plain):
    assert numbers(plain, "fresh") == [-1, -1, 1] * 3


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_a_cluster_see_each_other(programs, seed):
    expected = []
    for block in range(6):
        other = block ^ 1
        expected += [word for thread in range(32) for word in (other, 100 * other + thread)]
    assert numbers(programs(32), "neighbours", 0, seed) == expected


def test_sixteen_bits(plain):
    values = [1.0, -2.5, 65504.0, 65520.0, 1e-7, 1.00390625, 1.01171875, 3.4e38, math.inf]
    x = torch.tensor(values)
    halves = [half & 0xFFFF for half in x.half().view(torch.int16).tolist()]
    bf16s = (x.bfloat16().view(torch.int16).int() << 16).tolist()
    *out, half_nan, bf16_nan = numbers(plain, "packed")
    assert out == [word for pair in zip(halves, bf16s, strict=True) for word in pair]
    assert half_nan & 0x7E00 == 0x7E00 and bf16_nan & 0x7FC00000 == 0x7FC00000
    assert numbers(plain, "halves")[0] >= 0x10000 - 2 * 1023  # only NaNs may change


def line_of(text):
    """`checks.cu:N` of the only line that contains `text`."""
    found = [n for n, line in enumerate(SOURCE.read_text().splitlines(), 1) if text in line]
    assert len(found) == 1, text
    return f"checks.cu:{found[0]}"


@pytest.mark.parametrize(
    ("kind", "message"),
    {
        "two barriers": (0, r"thread \d+ comes to barrier .*elsewhere; .*0-\d+ wait at barrier"),
        "a barrier and a shuffle": (
            1,
            r"deadlock; .*wait at barrier .*; .*wait at shuffle_xor by 1",
        ),
        "two shuffles": (2, r"comes to shuffle_xor by 1 .*elsewhere; .*wait at shuffle_xor by 1"),
        "half a shuffle": (3, r"thread \d+ exits, and others wait for it; .*shuffle_xor by 1"),
        "an exit, then a barrier": (4, r"comes to barrier .*others have exited; threads 0-\d+ "),
        "a barrier, then an exit": (5, r"thread \d+ exits, .*; threads 0-\d+ wait at barrier"),
        "two masks": (6, r"comes to shuffle_xor by 2 .*elsewhere; .*wait at shuffle_xor by 1"),
        "no such lane": (7, r"comes to shuffle_xor by (32|64) .*outside of a warp"),
        "too much shared memory": (8, r"49156 bytes with too_much \(checks.cu"),
        "a launch in a kernel": (9, r"inner: launched from inside a kernel"),
        "an exception": (10, r"the kernel's own"),
    }.values(),
)
def test_rules_of_threads(plain, kind, message):
    found = error(plain, "diverge", kind)
    assert re.search(message, found), found
    if kind < 9:
        assert found.startswith("diverge, block 0: ") and "checks.cu:" in found
    error(plain, "diverge", kind, seed=5)  # in any order


@pytest.mark.parametrize(
    ("kind", "message"),
    {
        "not shared": (2, "cluster_map: no shared memory of this block"),
        "an exit before the other reads": (4, "cluster_map: block . of the cluster has exited"),
        "an exit before a barrier": (5, "exited"),
    }.values(),
)
def test_rules_of_clusters(programs, kind, message):
    found = error(programs(32), "neighbours", kind)
    assert re.search(message, found), found


def test_a_cluster_that_does_not_wait_reads_what_is_not_there_yet(programs):
    assert numbers(programs(32), "neighbours", 1)[:2] == [-1, -1]


def test_copies_come_when_they_are_waited_for(plain, warp):
    assert numbers(plain, "copies")[::4] == list(range(warp))
    assert numbers(plain, "copies", 1)[::4] == [-1] * warp


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (2, r"thread \d+ exits before async_wait"),
        (3, "async_copy: an address that is no multiple of 16"),
        (4, "async_copy: no shared memory of this block"),
    ],
)
def test_rules_of_copies(plain, kind, message):
    found = error(plain, "copies", kind)
    assert re.search(message, found), found


@pytest.mark.parametrize("kind", range(7))
def test_refused_launches(plain, kind):
    assert error(plain, "refused", kind).startswith("refused: refused by the SIMT shim (grid of ")


def test_the_largest_launch_is_not_refused(plain, warp):
    assert numbers(plain, "largest") == [
        -7 if thread // warp == 1 else warp for thread in range(1024)
    ]


def test_a_missing_barrier_depends_on_the_seed(plain, warp):
    right = block_sums(warp)[: 4 * warp]
    wrong = {tuple(numbers(plain, "racing_sums", 0, seed)) for seed in range(4)}
    assert len(wrong) > 1 and tuple(right) not in wrong


@pytest.mark.long
@pytest.mark.parametrize(("name", "size"), [("global", 4), ("static", 4), ("dynamic", 32)])
def test_address_sanitizer_knows_the_ends_of_arrays(programs, name, size):
    program = programs(32, build_shim.ASAN)
    for inside in (0, size - 1):
        numbers(program, name, inside)
    for outside in (-1, size):
        done = run(program, name, outside)
        assert done.returncode and "heap-buffer-overflow" in done.stderr, done.stderr
        assert line_of("at[offset] = 1;") in done.stderr


@pytest.mark.long
def test_address_sanitizer_follows_the_threads(programs):
    program = programs(32, build_shim.ASAN)
    assert numbers(program, "sums", 0, 1) == numbers(program, "again", 0, 2) == block_sums(32)
    assert len(numbers(program, "neighbours")) == 384
    done = run(program, "misaligned")
    assert done.returncode and "misaligned address" in done.stderr
    # The address is mapped in time, but read after its block has exited.
    done = run(program, "neighbours", 3)
    assert done.returncode and "use-after-poison" in done.stderr, done.stderr
    assert line_of("*early : *simt::cluster_map") in done.stderr


@pytest.mark.long
def test_thread_sanitizer_names_races(programs):
    program = programs(32, build_shim.TSAN)
    done = run(program, "sums")
    assert done.returncode == 0, done.stderr
    assert numbers(program, "sums", 0, 1) == numbers(program, "again", 0, 2) == block_sums(32)
    assert len(numbers(program, "neighbours", 0, 3)) == 384 and numbers(program, "fresh")
    races = {
        ("racing_sums", 0): ("scratch[warp_id()] = own", "sum += scratch[warp]"),
        ("neighbours", 1): ("*id = static_cast<int>(block_id());",),
        ("neighbours", 3): ("*early : *simt::cluster_map",),  # races with the end of the block
        ("collide", 0): ("*out = static_cast<int>(block_id())",),  # races with another block's
    }
    for (name, kind), lines in races.items():
        done = run(program, name, kind)
        assert done.returncode and "data race" in done.stderr, done.stdout + done.stderr
        for line in lines:
            assert line_of(line) in done.stderr

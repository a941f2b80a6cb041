"""Test the PTX interpreter: arithmetic against exact results, and the errors it must raise."""

from fractions import Fraction

import numpy as np
import pytest

from bench.without_gpu.ptx import Kernel, Machine, entries
from bench.without_gpu.ptx.arithmetic import fused
from bench.without_gpu.ptx.values import bfloat16_bits

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"


def kernel(body, shared=""):
    text = f".visible .entry k(.param .u64 p) {{ .reg .b32 %r<9>; {shared} {body} ret; }}"
    return Kernel(HEAD + text)


def run(body, array, threads=32, seed=None, shared=""):
    machine = Machine(seed)
    address = machine.add("a", array)
    machine.launch(kernel(body, shared), 1, threads, [address])
    return machine


# %rd2: the address of the lane's own 32-bit word.
OWN = (
    "ld.param.u64 %rd1, [p]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; "
    "add.s64 %rd2, %rd2, %rd1; "
)


def test_lanes_loads_and_counts():
    array = np.arange(32, dtype=np.uint32)
    machine = run(OWN + "ld.global.b32 %r2, [%rd2]; shl.b32 %r2, %r2, 1; "
                  "setp.lt.u32 %p1, %r1, 8; @%p1 st.global.b32 [%rd2], %r2;", array)  # fmt: skip
    assert array.tolist() == [2 * i if i < 8 else i for i in range(32)]
    assert machine.counts.loaded["a"] == 128 and machine.counts.stored["a"] == 32
    assert machine.counts.instructions["st"] == 1


def test_votes_and_counted_bits():
    array = np.arange(64, dtype=np.uint32)
    run(OWN + "ld.global.b32 %r2, [%rd2]; and.b32 %r3, %r2, 33; setp.eq.u32 %p1, %r3, 33; "
        "vote.sync.ballot.b32 %r4, %p1, -1; popc.b32 %r5, %r4; xor.b32 %r4, %r4, %r5; "
        "st.global.b32 [%rd2], %r4;", array, threads=64)  # fmt: skip
    assert array.tolist() == [0] * 32 + [0xAAAAAAAA ^ 16] * 32


def test_what_a_warp_reads_at_one_address_counts_once():
    machine = run(OWN + "ld.global.b32 %r2, [%rd1];", np.zeros(32, np.uint32), threads=64)
    assert machine.counts.loaded["a"] == 2 * 4


def test_branches_diverge_and_meet():
    array = np.zeros(32, np.uint32)
    run(OWN + "mov.b32 %r3, 0;\n$L_1:\n add.s32 %r3, %r3, 1; setp.lt.u32 %p1, %r3, %r1; "
        "@%p1 bra $L_1; st.global.b32 [%rd2], %r3;", array)  # fmt: skip
    assert array.tolist() == [max(1, i) for i in range(32)]


def test_shuffle_adds_up_a_warp():
    array = np.arange(32, dtype=np.uint32)
    steps = "".join(
        f"shfl.sync.bfly.b32 %r4, %r2, {n}, 31, -1; add.s32 %r2, %r2, %r4; "
        for n in (16, 8, 4, 2, 1)
    )
    run(OWN + f"ld.global.b32 %r2, [%rd2]; {steps} st.global.b32 [%rd2], %r2;", array)
    assert array.tolist() == [sum(range(32))] * 32


@pytest.mark.parametrize(
    ("error", "body"),
    {
        "past the end": (MemoryError, "ld.global.b32 %r2, [%rd2+4];"),
        "before the start": (MemoryError, "ld.global.b32 %r2, [%rd2+-4];"),
        "misaligned": (MemoryError, "ld.global.b32 %r2, [%rd2+2];"),
        "shared": (MemoryError, "mov.b32 %r2, 128; ld.shared.b32 %r3, [%r2];"),
        "lanes missing": (
            RuntimeError,
            "setp.lt.u32 %p1, %r1, 8; @%p1 shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;",
        ),
        "unknown": (NotImplementedError, "atom.global.add.u32 %r2, [%rd2], 1;"),
        "another rounding": (NotImplementedError, "add.rz.f32 %r2, %r1, %r1;"),
    }.values(),
)
def test_errors(error, body):
    with pytest.raises(error):
        run(OWN + body, np.zeros(32, np.uint32), shared=".shared .align 4 .b8 s[64];")


EXCHANGE = (
    "mov.u32 %r2, s; shl.b32 %r3, %r1, 2; add.s32 %r4, %r2, %r3; st.shared.b32 [%r4], %r1; "
    "{barrier} xor.b32 %r5, %r3, 128; add.s32 %r5, %r2, %r5; ld.shared.b32 %r6, [%r5]; "
    "st.global.b32 [%rd2], %r6;"
)


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_a_missing_barrier_shows_in_a_random_order_only(barrier):
    """Each of two warps reads what the other wrote. In step this works without a barrier too."""
    right, wrong = [i ^ 32 for i in range(64)], []
    for seed in (None, 0, 1, 2, 3):
        array = np.zeros(64, np.uint32)
        run(OWN + EXCHANGE.format(barrier=barrier), array, 64, seed, ".shared .align 4 .b8 s[256];")
        wrong.append(array.tolist() != right)
    assert not wrong[0]
    assert any(wrong) == (not barrier)


MODULE = """
.visible .entry first(.param .u64 p) { ret; }
.visible .entry second(
  .param .align 8 .b8 second_param_0[24],
  .param .f32 second_param_1
) .maxntid 32, 1, 1 {
  .shared .align 16 .b8 s[128];
  .reg .b32 %r<9>; .reg .f32 %f<9>; .reg .b64 %rd<9>; .reg .pred %p<2>;
  mov.b64 %rd1, second_param_0;
  ld.param.u64 %rd2, [second_param_0+8];
  ld.param.v2.u32 {%r1, %r2}, [%rd1+16];
  ld.param.f32 %f1, [second_param_1];
  cvta.to.global.u64 %rd3, %rd2;
  mov.u32 %r3, %tid.x;
  mul.wide.u32 %rd4, %r3, 4;
  mov.u64 %rd5, s;
  cvta.shared.u64 %rd6, %rd5;
  add.s64 %rd6, %rd6, %rd4;
  st.u32 [%rd6], %r3;
  ld.shared.u32 %r4, [s+4];
  cvta.to.shared.u64 %rd7, %rd6;
  ld.shared.u32 %r5, [%rd7];
  add.s32 %r5, %r5, %r4;
  add.s32 %r5, %r5, %r1;
  add.s32 %r5, %r5, %r2;
  mov.b32 %r6, %f1;
  shf.r.wrap.b32 %r7, %r6, %r5, 8;
  add.s64 %rd8, %rd3, %rd4;
  st.u32 [%rd8], %r7;
  ret;
}
"""


def test_an_entry_of_several_with_structs_and_generic_addresses():
    assert entries(MODULE) == ["first", "second"]
    machine, array = Machine(), np.zeros(32, np.uint32)
    address = machine.add("a", array)
    struct = np.array([7, address, 100 | 1000 << 32], np.uint64).tobytes()
    code = Kernel(HEAD + MODULE, "second")
    machine.launch(code, 1, 32, [struct, 1.0])
    # Shifted right by a byte: the low word is 1.0f, the high word is the lane's sum.
    high = [i + 1 + 1100 for i in range(32)]
    assert array.tolist() == [(h << 24 | 0x3F800000 >> 8) & 0xFFFFFFFF for h in high]
    assert machine.counts.stored == {"shared": 128, "a": 128}
    with pytest.raises(ValueError, match="expected 24 bytes"):
        machine.launch(code, 1, 32, [struct[:16], 1.0])


@pytest.mark.parametrize(
    ("shift", "amount", "expected"),
    [
        ("r.wrap", 36, 0x2_1234567),  # by 36 mod 32 = 4, from 0x9ABCDEF2_12345678
        ("r.clamp", 36, 0x9ABCDEF2),
        ("l.wrap", 4, 0xABCDEF21),
        ("l.clamp", 40, 0x12345678),
        ("r.wrap", 0, 0x12345678),
    ],
)
def test_funnel_shift(shift, amount, expected):
    array = np.full(32, amount, np.uint32)
    run(OWN + f"ld.global.b32 %r2, [%rd2]; mov.b32 %r3, {0x12345678}; mov.b32 %r4, {0x9ABCDEF2}; "
        f"shf.{shift}.b32 %r5, %r3, %r4, %r2; st.global.b32 [%rd2], %r5;", array)  # fmt: skip
    assert array.tolist() == [expected] * 32


def test_bytes_that_were_touched():
    machine = run(OWN + "ld.global.b32 %r2, [%rd1]; ld.global.b32 %r2, [%rd1+8];",
                  np.zeros(32, np.uint32))  # fmt: skip
    assert machine.counts.touched("a") == 8 and machine.counts.touched("b") == 0


def test_fused_multiply_add_rounds_once():
    random = np.random.default_rng(0)
    a, b, c = (
        (random.standard_normal(2000) * 2.0 ** random.integers(-12, 12, 2000)).astype(np.float32)
        for _ in range(3)
    )
    # 2^-60 below a tie in float32, which float64 rounds to the tie, and from there upwards.
    a = np.append(a, np.float32(1 + 2**-18)).astype(np.float32)
    b = np.append(b, np.float32(2**-24 * (1 - 2**-18))).astype(np.float32)
    c = np.append(c, np.float32(1 + 2**-23)).astype(np.float32)
    assert np.float32(float(a[-1]) * float(b[-1]) + float(c[-1])) != fused(a, b, c)[-1]
    for x, y, z, found in zip(a, b, c, fused(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = [np.nextafter(found, np.float32(d)) for d in (-np.inf, np.inf)]
        distance = abs(Fraction(float(found)) - exact)
        assert all(distance <= abs(Fraction(float(n)) - exact) for n in near)


def test_bfloat16_rounds_to_nearest_even():
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, np.inf], np.float32)
    assert bfloat16_bits(x).tolist() == [0x3F80, 0x3F82, 0x3F81, 0xBF80, 0x7F80]
    assert bfloat16_bits(np.array([np.nan], np.float32)).tolist() == [0x7FFF]

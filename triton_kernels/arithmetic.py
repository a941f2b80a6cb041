"""Device functions that the row kernels share: arithmetic and memory access.

FMAs are written out and every kernel is launched without contraction, so a formula gives the same
bits in every kernel.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..rowmath import RowMath

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))

#: A value of SOFTCAP in the kernels, which is RowMath.cap.
SMALL_CAP = tl.constexpr(1)

NOT_SCORED = tl.constexpr(-1)
OUT_OF_VOCABULARY = tl.constexpr(-2)

#: Indices of the statistics of a row; the maximum has index 0. See backends/contract.py.
SUM_EXP = tl.constexpr(1)
TARGET = tl.constexpr(2)
SUM = tl.constexpr(3)
ARGMAX = tl.constexpr(4)
MOMENT = tl.constexpr(5)


@triton.jit
def widen(x):
    """A bf16, fp16 or fp32 tensor in fp32."""
    if INTERPRETED and x.dtype == tl.bfloat16:  # the interpreter's own cast breaks subnormals
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """An fp32 tensor, rounded once to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter's own cast truncates
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, bits, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def exp(u):
    """e^u, as exact as the hardware's exp2; 0 for -inf, NaN for NaN."""
    return tl.exp2(u * LOG2E)


@triton.jit
def not_minus_infinity(m):
    """A maximum that may be subtracted: 0 instead of -inf, because -inf - -inf is NaN."""
    return tl.where(m == -INF, 0.0, m)


@triton.jit
def far_from_0(unit_log2):
    """The `far` of `reference_of`: the power of two that times unit_log2 is 2^30 to 2^31."""
    field = 284 - (unit_log2.to(tl.int32, bitcast=True) >> 23)
    return (tl.minimum(tl.maximum(field, 33), 255) << 23).to(tl.float32, bitcast=True)


@triton.jit
def reference_of(m, unit_log2, far):
    """(unit_log2, rounded, rest) for 2^(x * unit_log2 - m * unit_log2), where m is a maximum.

    It is computed as 2^(x * unit_log2 - rounded): one FMA and one exp2. `rounded` is the rounded
    product m * unit_log2. All x get the same error, a factor 2^rest, which is removed once, at the
    end. From |m| = far on, rest would be too large, and unit_log2 is replaced by a power of two,
    with which the product is exact. reference_of in csrc/gpu/row_math.cuh explains why both are
    right.
    """
    exponent = m.to(tl.uint32, bitcast=True) & 0x7F800000
    power = (0x8F000000 - exponent).to(tl.float32, bitcast=True)  # its exponent is 286 - that of m
    unit_log2 = tl.where(tl.abs(m) >= far, power, unit_log2)
    rounded = m * unit_log2
    return unit_log2, rounded, tl.fma(m, unit_log2, -rounded)


@triton.jit
def reciprocal(x):
    """1 / x for x >= 1, as exact as the hardware's; Triton's own division also checks the range."""
    if INTERPRETED:
        return 1.0 / x
    return libdevice.fast_dividef(1.0, x)


@triton.jit
def small_cap(x, inward, cap):
    """As small_cap in csrc/gpu/row_math.cuh, which states the error."""
    r = reciprocal(1.0 + tl.exp2(x * inward))
    return tl.fma(r, -2.0 * cap, cap), 4.0 * r * (1.0 - r)


@triton.jit
def large_cap(x, inward, cap):
    """As large_cap in csrc/gpu/row_math.cuh, which explains the coefficients."""
    u = tl.maximum(tl.minimum(x * inward, 9.2), -9.2)
    s = u * u
    p = tl.fma(s, 1.3714539e-8, 2.0865291e-5)
    p = tl.fma(p, s, 0.0035110474)
    p = tl.fma(p, s, 0.13394015)
    p = tl.fma(p, s, 1.0)
    q = tl.fma(s, 7.9227329e-7, 3.3109872e-4)
    q = tl.fma(q, s, 0.025935707)
    q = tl.fma(q, s, 0.46727334)
    q = tl.fma(q, s, 1.0)
    bent = u * p * reciprocal(q)
    return cap * bent, tl.maximum(tl.fma(-bent, bent, 1.0), 0.0)


@triton.jit
def cap_and_slope(x, inward, cap, SOFTCAP: tl.constexpr):
    """z = cap * tanh(logit_scale * x / cap), infinities unchanged, and (dz/dx) / logit_scale."""
    if SOFTCAP == SMALL_CAP:
        value, slope = small_cap(x, inward, cap)
    else:
        value, slope = large_cap(x, inward, cap)
    return tl.where(tl.abs(x) < INF, value, x), slope


@triton.jit
def row_pointer(base, row, seq, stride_b, stride_s, ALIGNED: tl.constexpr):
    """Pointer to column 0 of row b * seq + s.

    Offsets are int64, because N * V can exceed 2^31. ALIGNED: every row starts at a multiple of 16
    bytes. Triton cannot derive this from strides that are not multiples of 16.
    """
    start = (row // seq).to(tl.int64) * stride_b + (row % seq).to(tl.int64) * stride_s
    if ALIGNED:
        start = tl.multiple_of(start, 128 // base.dtype.element_ty.primitive_bitwidth)
    return base + start


@triton.jit
def tile_runs(RUNS: tl.constexpr, THREADS: tl.constexpr):
    """The first column `[RUNS, THREADS]` of each run of 8 neighbouring columns in a tile."""
    return tl.arange(0, RUNS)[:, None] * (THREADS * 8) + tl.arange(0, THREADS)[None, :] * 8


@triton.jit
def tile_columns(RUNS: tl.constexpr, THREADS: tl.constexpr):
    """The columns `[RUNS, THREADS, 8]` of a tile; each thread has RUNS runs of 8 neighbours.

    Reductions over the first and the last axis stay inside a thread.
    """
    return tile_runs(RUNS, THREADS)[:, :, None] + tl.arange(0, 8)[None, None, :]


@triton.jit
def load_columns(row, column, end, MASKED: tl.constexpr):
    """row[column] in fp32; if MASKED, -inf for columns from `end` on."""
    if MASKED:
        x = tl.load(row + column, mask=column < end, other=-INF)
    else:
        x = tl.load(row + column)
    return widen(x)


@triton.jit
def load_four(row, column, end, MASKED: tl.constexpr):
    """The logits at column + (0, 2, 4, 6), as `[..., 2, 2]`."""
    low = tl.join(
        load_columns(row, column, end, MASKED), load_columns(row, column + 4, end, MASKED)
    )
    high = tl.join(
        load_columns(row, column + 2, end, MASKED), load_columns(row, column + 6, end, MASKED)
    )
    return tl.join(low, high)


@triton.jit
def load_tile(
    tile,  # pointer to the tile's first column
    end,  # if MASKED, columns from here on are -inf; counted from the tile's first
    RUNS: tl.constexpr,
    THREADS: tl.constexpr,
    ALIGNED: tl.constexpr,  # the tile starts at a multiple of 16 bytes
    MASKED: tl.constexpr,
):
    """A tile in fp32, `[RUNS, THREADS, 8]`.

    Every dtype and alignment puts the same logits into the same registers of the same threads, so
    sums have the same bits. By default Triton gives a thread as many columns as 16 aligned bytes
    hold: 8, 4 or 1. So this function joins a run of 8 from two loads of 4 fp32 columns, or from 8
    loads of one column if rows are not aligned.
    """
    run = tile_runs(RUNS, THREADS)
    if not ALIGNED:
        even = load_four(tile, run, end, MASKED)
        x = tl.join(even, load_four(tile, run + 1, end, MASKED))
    elif tile.dtype.element_ty == tl.float32:
        four = run[:, :, None] + tl.arange(0, 4)[None, None, :]
        low = load_columns(tile, four, end, MASKED)
        high = load_columns(tile, four + 4, end, MASKED)
        x = tl.permute(tl.join(low, high), (0, 1, 3, 2))
    else:
        x = load_columns(tile, tile_columns(RUNS, THREADS), end, MASKED)
    return tl.reshape(x, [RUNS, THREADS, 8])


@triton.jit
def max_tile(x):
    """Maximum over a thread's columns: `[RUNS, THREADS, 8]` -> `[THREADS]`."""
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def sum_tile(x, RUNS: tl.constexpr, THREADS: tl.constexpr):
    """Sum over a thread's columns: `[RUNS, THREADS, 8]` -> `[THREADS]`.

    Triton adds in the order of a thread's registers, which depends on how the tile was loaded. So
    the columns are added in pairs: the sum of two numbers does not depend on their order.
    """
    x = tl.reshape(x, [RUNS, THREADS, 2, 2, 2])
    return tl.sum(tl.sum(tl.sum(tl.sum(x, 4), 3), 2), 0)


@triton.jit
def fold(max_a, sum_a, x_a, id_a, moment_a, max_b, sum_b, x_b, id_b, moment_b, unit):
    """Merge the statistics of two column ranges, `a` left of `b`.

    They are maximum, sum of exp, sum of x, id of the maximum and moment, in units of x (z = unit *
    x); scalars, or tensors with one element per row. Segments and shards are both merged with this
    function, left to right. If the maxima are equal, the smaller id is kept. If a side's factor is
    0, its delta may be -inf and is replaced by 0, because -inf * 0 is NaN.
    """
    top = tl.maximum(max_a, max_b)
    reference = not_minus_infinity(top)
    delta_a = (max_a - reference) * unit
    delta_b = (max_b - reference) * unit
    shrink_a = exp(delta_a)
    shrink_b = exp(delta_b)
    moment_a = tl.fma(tl.where(shrink_a == 0.0, 0.0, delta_a), sum_a, moment_a)
    moment_b = tl.fma(tl.where(shrink_b == 0.0, 0.0, delta_b), sum_b, moment_b)
    tied = tl.minimum(id_a, id_b)
    return (
        top,
        tl.fma(sum_b, shrink_b, sum_a * shrink_a),
        x_a + x_b,
        tl.where(max_b > max_a, id_b, tl.where(max_b == max_a, tied, id_a)),
        tl.fma(moment_b, shrink_b, moment_a * shrink_a),
    )


@triton.jit
def load_stats(stats, mask, STATISTICS: tl.constexpr):
    """The arguments of `fold` for the statistics at `stats`; 0 for those that are not stored."""
    top = tl.load(stats, mask=mask, other=0.0)
    total = tl.load(stats + SUM_EXP, mask=mask, other=0.0)
    x_sum = tl.zeros_like(top)
    top_id = x_sum
    moment = x_sum
    if STATISTICS > SUM:
        x_sum = tl.load(stats + SUM, mask=mask, other=0.0)
    if STATISTICS > ARGMAX:
        top_id = tl.load(stats + ARGMAX, mask=mask, other=0.0)
        moment = tl.load(stats + MOMENT, mask=mask, other=0.0)
    return top, total, x_sum, top_id, moment


@triton.jit
def store_stats(stats, top, total, x_sum, top_id, moment, mask, STATISTICS: tl.constexpr):
    """The inverse of `load_stats`. The caller stores the target's x at TARGET."""
    tl.store(stats, top, mask=mask)
    tl.store(stats + SUM_EXP, total, mask=mask)
    if STATISTICS > SUM:
        tl.store(stats + SUM, x_sum, mask=mask)
    if STATISTICS > ARGMAX:
        tl.store(stats + ARGMAX, top_id, mask=mask)
        tl.store(stats + MOMENT, moment, mask=mask)


#: Whether Triton interprets these functions in numpy (TRITON_INTERPRET=1, read once, on import).
INTERPRETED = tl.constexpr(not isinstance(widen, triton.JITFunction))


def cap_arguments(math: RowMath) -> dict:
    """The arguments of `cap_and_slope`, as units_of in csrc/gpu/row_math.cuh computes them."""
    inward = math.logit_scale / math.softcap if math.softcap else 0.0
    if math.cap == SMALL_CAP.value:
        # The largest number, not infinity: infinity * 0 is NaN.
        inward = min(2 * LOG2E.value * inward, torch.finfo(torch.float32).max)
    return {"inward": inward, "cap": math.softcap, "SOFTCAP": math.cap}

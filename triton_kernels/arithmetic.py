"""Arithmetic and memory access that the row kernels share: device functions only.

Sums are written as explicit FMAs and every kernel is launched with contraction off, so a number
has the same bits in whichever kernel it is computed.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))

NOT_SCORED = tl.constexpr(-1)
OUT_OF_VOCABULARY = tl.constexpr(-2)

#: Where statistics lie in a row of them; the maximum is first. See backends/contract.py.
SUM_EXP = tl.constexpr(1)
TARGET = tl.constexpr(2)
SUM = tl.constexpr(3)
ARGMAX = tl.constexpr(4)
MOMENT = tl.constexpr(5)


@triton.jit
def widen(x):
    """fp32 of a bf16, fp16 or fp32 tensor."""
    if INTERPRETED and x.dtype == tl.bfloat16:  # the interpreter's own cast breaks subnormals
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """An fp32 tensor rounded once, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter's own cast truncates
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, bits, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def exp(u):
    """e^u, to the last bits of the hardware's exp2; 0 for -inf, NaN for NaN."""
    return tl.exp2(u * LOG2E)


@triton.jit
def not_minus_infinity(m):
    """A maximum that may be subtracted: 0 for -inf, where -inf - -inf would make a NaN."""
    return tl.where(m == -INF, 0.0, m)


@triton.jit
def far_from_0(scale):
    """|m| from here on: see `reference_of`. A power of two times scale is 2^30 to 2^31."""
    field = 284 - (scale.to(tl.int32, bitcast=True) >> 23)
    return (tl.minimum(tl.maximum(field, 33), 255) << 23).to(tl.float32, bitcast=True)


@triton.jit
def reference_of(m, scale, far):
    """(scale, rounded, rest): what 2^(x * scale - m * scale), m being a maximum, is computed
    against: one FMA and one exp2, of x * scale - rounded.

    Against the rounded product m * scale. The rounding is one factor for all x, 2^rest, of up to
    half a unit of the product: too much for the sum, so it is taken out once, at the end.

    From |m| = far on that half unit would be 2^64 and soon more than exp2 can say. But there the
    fp32 numbers beside m are 64 and more below it in the exponent: a logit is as large as m or it
    vanishes. That is what any larger scale says, too: the power of two that makes the product 2^32
    to 2^33 has no rounding (rest is 0), gives 0 for x = m, -256 at most for any other, and never
    overflows upwards.

    Sums against an older maximum `old` <= m are moved by 2^(old * scale - rounded). That is right
    across `far` as well: it is a power of two, so old = -far has an exact product, and any m above
    it another one, at least a unit (128) higher, of which rest is half at most.
    """
    exponent = m.to(tl.uint32, bitcast=True) & 0x7F800000
    power = (0x8F000000 - exponent).to(tl.float32, bitcast=True)  # its exponent is 286 - that of m
    scale = tl.where(tl.abs(m) >= far, power, scale)
    rounded = m * scale
    return scale, rounded, tl.fma(m, scale, -rounded)


@triton.jit
def tanh_and_slope(u):
    """tanh u and 1 - tanh^2 u: by e^{-2|u|}, near 0 by the odd Taylor series.

    The series' next term is 1382/155925 u^11: under 4e-8 relative for |u| < 0.25.
    """
    magnitude = tl.abs(u)
    e = exp(-2.0 * magnitude)
    inverse = 1.0 / (1.0 + e)
    far = (1.0 - e) * inverse
    far = tl.where(u < 0.0, -far, far)
    s = u * u
    series = tl.fma(s, 62.0 / 2835.0, -17.0 / 315.0)
    series = tl.fma(series, s, 2.0 / 15.0)
    series = tl.fma(series, s, -1.0 / 3.0)
    near = tl.fma(u, s * series, u)
    return tl.where(magnitude < 0.25, near, far), 4.0 * e * inverse * inverse


@triton.jit
def cap_and_slope(x, inward, cap):
    """cap * tanh(x * inward), infinities as they are, and its derivative over cap * inward."""
    value, slope = tanh_and_slope(x * inward)
    return tl.where(tl.abs(x) == INF, x, cap * value), slope


@triton.jit
def row_pointer(base, row, seq, stride_b, stride_s, ALIGNED: tl.constexpr):
    """Pointer to column 0 of row b * seq + s.

    Offsets are int64: N * V passes 2^31 long before a cluster notices. ALIGNED: every row starts
    at a multiple of 16 bytes, which Triton cannot know of strides that are not multiples of 16.
    """
    start = (row // seq).to(tl.int64) * stride_b + (row % seq).to(tl.int64) * stride_s
    if ALIGNED:
        start = tl.multiple_of(start, 128 // base.dtype.element_ty.primitive_bitwidth)
    return base + start


@triton.jit
def tile_runs(RUNS: tl.constexpr, THREADS: tl.constexpr):
    """First columns `[RUNS, THREADS]` of a tile's runs of 8 neighbours."""
    return tl.arange(0, RUNS)[:, None] * (THREADS * 8) + tl.arange(0, THREADS)[None, :] * 8


@triton.jit
def tile_columns(RUNS: tl.constexpr, THREADS: tl.constexpr):
    """Columns `[RUNS, THREADS, 8]` of a tile, RUNS runs of 8 neighbours for each thread.

    Reductions over the first and the last axis stay inside a thread.
    """
    return tile_runs(RUNS, THREADS)[:, :, None] + tl.arange(0, 8)[None, None, :]


@triton.jit
def load_columns(row, column, end, MASKED: tl.constexpr):
    """fp32 of row[column]; -inf from `end` on, when MASKED."""
    if MASKED:
        x = tl.load(row + column, mask=column < end, other=-INF)
    else:
        x = tl.load(row + column)
    return widen(x)


@triton.jit
def load_four(row, column, end, MASKED: tl.constexpr):
    """`[..., 2, 2]` of columns column + (0, 2, 4, 6)."""
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
    end,  # columns from here on, counted from the tile's first, are -inf when MASKED
    RUNS: tl.constexpr,
    THREADS: tl.constexpr,
    ALIGNED: tl.constexpr,  # the tile starts at a multiple of 16 bytes
    MASKED: tl.constexpr,
):
    """fp32 `[RUNS, THREADS, 8]`: the same numbers in the same registers of the same threads for
    every dtype and alignment, hence sums with the same bits.

    Left to itself Triton would give a thread what 16 aligned bytes hold, 8, 4 or 1 columns. So
    two fp32 loads are joined to a run of 8, and where 16 bytes are not aligned 8 single columns.
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
    """`[RUNS, THREADS, 8]` -> `[THREADS]`, inside a thread."""
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def sum_tile(x, RUNS: tl.constexpr, THREADS: tl.constexpr):
    """`[RUNS, THREADS, 8]` -> `[THREADS]`, inside a thread.

    Pair by pair: Triton adds in the order of a thread's registers, which depends on how the tile
    was loaded, but of two numbers the sum is the same either way.
    """
    x = tl.reshape(x, [RUNS, THREADS, 2, 2, 2])
    return tl.sum(tl.sum(tl.sum(tl.sum(x, 4), 3), 2), 0)


@triton.jit
def fold(max_a, sum_a, x_a, id_a, moment_a, max_b, sum_b, x_b, id_b, moment_b, unit):
    """Statistics (maximum, sum of exp, sum of x, id of the maximum, moment) of columns a and b, in
    units of x: z = unit * x.

    The one merge there is, of a row's segments and of the ranks' shards, always left to right;
    scalars or tensors of rows. Of equal maxima the smaller id stays. A side that vanishes (its
    factor is 0) has no moment to move: -inf * 0 is no entropy.
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
    """What `fold` takes, of the row or rows of statistics at `stats`; 0 for what they lack."""
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
    """The inverse of `load_stats`; TARGET, the target's x, is the caller's."""
    tl.store(stats, top, mask=mask)
    tl.store(stats + SUM_EXP, total, mask=mask)
    if STATISTICS > SUM:
        tl.store(stats + SUM, x_sum, mask=mask)
    if STATISTICS > ARGMAX:
        tl.store(stats + ARGMAX, top_id, mask=mask)
        tl.store(stats + MOMENT, moment, mask=mask)


#: Whether TRITON_INTERPRET=1 made Triton run these functions in numpy; it decides once, on import.
INTERPRETED = tl.constexpr(not isinstance(widen, triton.JITFunction))

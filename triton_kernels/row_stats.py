"""Softmax statistics of each scored row, from one read of it.

A row is cut into segments of a fixed number of columns, and a segment into tiles. Each thread keeps
the running maximum and sums of its own columns; it rescales once per tile and exchanges nothing. At
the end of a segment the program reduces its threads, and segments are folded left to right. If
there are too few rows for the chip, several programs share a row's segments and write their
statistics to memory, and a second kernel folds them with the same function in the same order, so
the bits are the same.
"""

import torch
import triton
import triton.language as tl

from ..rowmath import MOST_SMALL_CAP, RowMath
from .arithmetic import (
    ARGMAX,
    INF,
    LN2,
    LOG2E,
    SUM,
    TARGET,
    cap_and_slope,
    cap_arguments,
    far_from_0,
    fold,
    load_stats,
    load_tile,
    max_tile,
    not_minus_infinity,
    reference_of,
    row_pointer,
    store_stats,
    sum_tile,
    tile_columns,
    widen,
)
from .launch import VECTOR_BLOCK, Chip, Launch, Shape, aligned, splits, vector_options

LAST = tl.constexpr(0x7FFFFFFF)  # a column beyond all columns


@triton.jit
def accumulate(
    x,  # [RUNS, THREADS, 8] fp32; -inf for columns that do not exist
    columns,  # its columns, counted from `first`
    first,
    end,  # if MASKED, columns from here on do not exist
    top,  # maximum of x; this and the next four are [THREADS]
    total,  # sum of 2^u with u = x * unit_log2 - rounded, from reference_of(top)
    x_sum,
    top_at,  # first column of the maximum
    moment,  # sum of u * 2^u
    unit_log2,  # unit * log2(e): an exponential is one FMA and one exp2
    far,
    inward,
    cap,
    STATISTICS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    RUNS: tl.constexpr,
    THREADS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add one tile to each thread's running statistics."""
    tile_top = max_tile(x)
    if STATISTICS > ARGMAX:
        at = tl.where(x == tile_top[None, :, None], first + columns, LAST)
    if SOFTCAP:  # it keeps the order of logits
        tile_top, _slope = cap_and_slope(tile_top, inward, cap, SOFTCAP)
        x, _slope = cap_and_slope(x, inward, cap, SOFTCAP)
    if STATISTICS > ARGMAX:
        top_at = tl.where(tile_top > top, tl.min(tl.min(at, 2), 0), top_at)
    new_top = tl.maximum(top, tile_top)
    unit_log2, reference, _rest = reference_of(not_minus_infinity(new_top), unit_log2, far)
    delta = top * unit_log2 - reference
    shrink = tl.exp2(delta)
    u = tl.fma(x, unit_log2[None, :, None], -reference[None, :, None])
    e = tl.exp2(u)
    if STATISTICS > ARGMAX:
        moment = tl.fma(tl.where(shrink == 0.0, 0.0, delta), total, moment) * shrink
        moment += sum_tile(tl.where(e == 0.0, 0.0, u * e), RUNS, THREADS)
    total = tl.fma(total, shrink, sum_tile(e, RUNS, THREADS))
    if STATISTICS > SUM:
        if MASKED:
            x = tl.where(columns < end - first, x, 0.0)
        x_sum += sum_tile(x, RUNS, THREADS)
    return new_top, total, x_sum, top_at, moment


@triton.jit
def segment_stats(
    row,  # pointer to column 0
    begin,
    end,
    unit,
    inward,
    cap,
    STATISTICS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    RUNS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The statistics of columns [begin, end), as scalars.

    They are maximum x, sum of exp(unit * (x - maximum)), sum of x, column of the maximum, moment.
    """
    TILE: tl.constexpr = RUNS * THREADS * 8
    unit_log2 = unit * LOG2E
    far = far_from_0(unit_log2)
    columns = tile_columns(RUNS, THREADS)
    top = tl.full([THREADS], -INF, tl.float32)
    total = tl.zeros([THREADS], tl.float32)
    x_sum = tl.zeros([THREADS], tl.float32)
    top_at = tl.zeros([THREADS], tl.int32)
    moment = tl.zeros([THREADS], tl.float32)
    whole = begin + (end - begin) // TILE * TILE
    for first in range(begin, whole, TILE):
        x = load_tile(row + first, TILE, RUNS, THREADS, ALIGNED, False)
        top, total, x_sum, top_at, moment = accumulate(
            x, columns, first, end, top, total, x_sum, top_at, moment,
            unit_log2, far, inward, cap, STATISTICS, SOFTCAP, RUNS, THREADS, False,
        )  # fmt: skip
    if whole < end:
        x = load_tile(row + whole, end - whole, RUNS, THREADS, ALIGNED, True)
        top, total, x_sum, top_at, moment = accumulate(
            x, columns, whole, end, top, total, x_sum, top_at, moment,
            unit_log2, far, inward, cap, STATISTICS, SOFTCAP, RUNS, THREADS, True,
        )  # fmt: skip
    row_top = tl.max(top, 0)
    unit_log2, reference, rest = reference_of(not_minus_infinity(row_top), unit_log2, far)
    delta = (top * unit_log2 - reference) - rest
    shrink = tl.exp2(delta)
    row_total = tl.sum(total * shrink, 0)
    # The maximum's own term is 1 before rounding. A sum below 1 could make a loss negative.
    row_total = tl.where((row_top > -INF) & (row_total < 1.0), 1.0, row_total)
    if STATISTICS > ARGMAX:
        top_at = tl.where(top == row_top, top_at, LAST)
        moment = tl.fma(tl.where(shrink == 0.0, 0.0, delta), total, moment) * shrink
    return (
        row_top,
        row_total,
        tl.sum(x_sum, 0),
        tl.min(top_at, 0),
        tl.sum(moment, 0) * LN2,
    )


@triton.jit(do_not_specialize=["seq", "stride_b", "stride_s", "vocab_start", "splits"])
def row_stats_kernel(
    logits,  # row n at (n // seq) * stride_b + (n % seq) * stride_s; `valid` columns are read
    target,  # [N] int64
    weight,  # [N] fp32; 0: the row is not read
    stats,  # [N, STATISTICS] fp32; if SPLIT, only the target's x is written
    parts,  # [N, segments, STATISTICS] fp32, if SPLIT; their TARGET is unused
    seq,
    stride_b: tl.int64,
    stride_s: tl.int64,
    valid,
    vocab_start: tl.int64,
    splits,  # programs per row
    unit,  # z = unit * x, with x capped first if SOFTCAP
    scale,  # [N] fp32: the unit of each row; or None
    inward,
    cap,
    STATISTICS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    SEGMENT: tl.constexpr,
    RUNS: tl.constexpr,
    THREADS: tl.constexpr,
):
    row = tl.program_id(0) // splits
    part = tl.program_id(0) % splits
    segments = tl.cdiv(valid, SEGMENT)
    stats += row.to(tl.int64) * STATISTICS
    if tl.load(weight + row) == 0.0:
        if not SPLIT:
            store_stats(stats, 0.0, 0.0, 0.0, 0.0, 0.0, None, STATISTICS)
            tl.store(stats + TARGET, 0.0)
        return
    if scale is not None:
        unit = tl.load(scale + row)
    logits = row_pointer(logits, row, seq, stride_b, stride_s, ALIGNED)
    top = -INF
    total = 0.0
    x_sum = 0.0
    top_id = INF
    moment = 0.0
    per_part = tl.cdiv(segments, splits)
    for segment in range(part * per_part, tl.minimum(part * per_part + per_part, segments)):
        begin = segment * SEGMENT
        end = tl.minimum(begin + SEGMENT, valid)
        s_top, s_total, s_sum, s_at, s_moment = segment_stats(
            logits, begin, end, unit, inward, cap, STATISTICS, SOFTCAP, ALIGNED, RUNS, THREADS
        )
        s_id = (vocab_start + s_at).to(tl.float32)
        if SPLIT:
            at = parts + (row.to(tl.int64) * segments + segment) * STATISTICS
            store_stats(at, s_top, s_total, s_sum, s_id, s_moment, None, STATISTICS)
        else:
            top, total, x_sum, top_id, moment = fold(
                top, total, x_sum, top_id, moment, s_top, s_total, s_sum, s_id, s_moment, unit
            )
    if not SPLIT:
        store_stats(stats, top, total, x_sum, top_id, moment, None, STATISTICS)
    if part == 0:
        label = tl.load(target + row)
        own = label - vocab_start
        owned = (label >= 0) & (own >= 0) & (own < valid)
        x_target = widen(tl.load(logits + own, mask=owned, other=0.0))
        if SOFTCAP:
            x_target, _slope = cap_and_slope(x_target, inward, cap, SOFTCAP)
        tl.store(stats + TARGET, tl.where(owned, x_target, 0.0))


@triton.jit(do_not_specialize=["rows", "segments"])
def fold_segments_kernel(
    parts,  # [N, segments, STATISTICS] fp32
    weight,  # [N] fp32; 0: the row's parts were not written
    stats,  # [N, STATISTICS] fp32; written, except the target's x of scored rows
    rows,
    segments,
    unit,  # z = unit * x
    scale,  # [N] fp32: the unit of each row; or None
    STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    scored = inside & (tl.load(weight + row, mask=inside, other=0.0) != 0.0)
    if scale is not None:
        unit = tl.load(scale + row, mask=scored, other=1.0)
    row = row.to(tl.int64)
    top = tl.full([BLOCK], -INF, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    x_sum = tl.zeros([BLOCK], tl.float32)
    top_id = tl.full([BLOCK], INF, tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for segment in range(0, segments):
        s_top, s_total, s_sum, s_id, s_moment = load_stats(
            parts + (row * segments + segment) * STATISTICS, scored, STATISTICS
        )
        top, total, x_sum, top_id, moment = fold(
            top, total, x_sum, top_id, moment, s_top, s_total, s_sum, s_id, s_moment, unit
        )
    store_stats(
        stats + row * STATISTICS,
        tl.where(scored, top, 0.0),
        tl.where(scored, total, 0.0),
        tl.where(scored, x_sum, 0.0),
        tl.where(scored, top_id, 0.0),
        tl.where(scored, moment, 0.0),
        inside,
        STATISTICS,
    )
    tl.store(stats + row * STATISTICS + TARGET, 0.0, mask=inside & ~scored)


def table_name(statistics: int, softcap: float) -> str:
    """The name of this use of the kernel in the launch table."""
    if statistics > ARGMAX.value:
        return "row_stats metrics"
    if softcap > MOST_SMALL_CAP:
        return "row_stats large softcap"
    return "row_stats softcap" if softcap else "row_stats"


def plan(
    chip: Chip,
    shape: Shape,
    math: RowMath,
    logits: torch.Tensor,  # [b, s, v]
    target: torch.Tensor,  # [N] int64
    weight: torch.Tensor,  # [N] fp32
    stats: torch.Tensor,  # [N, statistics] fp32, written
    scale: torch.Tensor | None = None,  # [N] fp32
) -> list[Launch]:
    """The launches that fill `stats`: one, or two if there are few rows."""
    statistics = stats.shape[1]
    valid = math.valid_columns(logits.shape[-1])
    rows, segments = weight.numel(), triton.cdiv(valid, shape.segment)
    parts_per_row = splits(chip, rows, segments)
    split = parts_per_row > 1
    parts = stats.new_empty((rows, segments, statistics)) if split else None
    launches = [
        Launch(
            row_stats_kernel,
            rows * parts_per_row,
            {
                "logits": logits,
                "target": target,
                "weight": weight,
                "stats": stats,
                "parts": parts,
                "seq": logits.shape[1],
                "stride_b": logits.stride(0),
                "stride_s": logits.stride(1),
                "valid": valid,
                "vocab_start": math.vocab_start,
                "splits": parts_per_row,
                "unit": math.unit,
                "scale": scale,
                "STATISTICS": statistics,
                **cap_arguments(math),
                "ALIGNED": aligned(logits),
                "SPLIT": split,
                "SEGMENT": shape.segment,
                "RUNS": shape.runs,
                "THREADS": shape.threads,
            },
            shape.options(chip),
        )
    ]
    if split:
        launches.append(
            Launch(
                fold_segments_kernel,
                triton.cdiv(rows, VECTOR_BLOCK),
                {
                    "parts": parts,
                    "weight": weight,
                    "stats": stats,
                    "rows": rows,
                    "segments": segments,
                    "unit": math.unit,
                    "scale": scale,
                    "STATISTICS": statistics,
                    "BLOCK": VECTOR_BLOCK,
                },
                vector_options(chip),
            )
        )
    return launches

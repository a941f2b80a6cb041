"""Folds each row's statistics over the shards, in rank order; computes its loss and metrics."""

import torch
import triton
import triton.language as tl

from ..rowmath import RowMath
from .arithmetic import INF, OUT_OF_VOCABULARY, TARGET, fold, load_stats
from .launch import VECTOR_BLOCK, Chip, Launch, vector_options


@triton.jit(do_not_specialize=["rows", "ranks", "stride_rank", "stride_row"])
def merge_kernel(
    gathered,  # [ranks, N, STATISTICS] fp32 at rank * stride_rank + n * stride_row
    target,  # [N] int64
    weight,  # [N] fp32; 0: the row's results are 0
    loss,  # [N] fp32: weight * loss; with METRICS the unweighted loss
    normalizer,  # [N, 2] fp32: maximum x, sum of exp(unit * (x - maximum))
    lse,  # [N] fp32; this and the next three only with METRICS
    log_prob,  # [N] fp32
    correct,  # [N] uint8
    entropy,  # [N] fp32
    rows,
    ranks,
    stride_rank: tl.int64,
    stride_row: tl.int64,
    unit,  # z = unit * x
    scale,  # [N] fp32: the unit of each row; or None
    vocab_size,  # fp32
    label_smoothing,
    z_loss,
    STATISTICS: tl.constexpr,
    METRICS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    row_weight = tl.load(weight + row, mask=inside, other=0.0)
    row_target = tl.load(target + row, mask=inside, other=0)
    scored = row_weight != 0.0
    if scale is not None:
        unit = tl.load(scale + row, mask=scored, other=1.0)
    top = tl.full([BLOCK], -INF, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    x_target = tl.zeros([BLOCK], tl.float32)
    x_sum = tl.zeros([BLOCK], tl.float32)
    top_id = tl.full([BLOCK], INF, tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    gathered += row.to(tl.int64) * stride_row
    for _rank in range(0, ranks):
        s_top, s_total, s_sum, s_id, s_moment = load_stats(gathered, inside, STATISTICS)
        top, total, x_sum, top_id, moment = fold(
            top, total, x_sum, top_id, moment, s_top, s_total, s_sum, s_id, s_moment, unit
        )
        x_target += tl.load(gathered + TARGET, mask=inside, other=0.0)
        gathered += stride_rank
    log_total = tl.log(total)
    row_lse = tl.fma(top, unit, log_total)
    # (maximum - x_y) first: both are logits, so the difference is exact if they are close.
    value = tl.fma(top - x_target, unit, log_total)
    if SMOOTHED:
        smooth = tl.fma(top - x_sum / vocab_size, unit, log_total)
        value = tl.fma(value, 1.0 - label_smoothing, label_smoothing * smooth)
    if Z_LOSS:
        value = tl.fma(row_lse * row_lse, z_loss, value)
    if not METRICS:
        value *= row_weight
    poison = tl.where(row_target == OUT_OF_VOCABULARY, float("nan"), 0.0)
    tl.store(loss + row, tl.where(scored, value + poison, 0.0), mask=inside)
    at = normalizer + row.to(tl.int64) * 2
    tl.store(at, tl.where(scored, top + poison, 0.0), mask=inside)
    tl.store(at + 1, tl.where(scored, total + poison, 0.0), mask=inside)
    if METRICS:
        tl.store(lse + row, tl.where(scored, row_lse + poison, 0.0), mask=inside)
        value = tl.fma(x_target - top, unit, -log_total)
        tl.store(log_prob + row, tl.where(scored, value + poison, 0.0), mask=inside)
        value = log_total - moment / total
        tl.store(entropy + row, tl.where(scored, value + poison, 0.0), mask=inside)
        hit = scored & (top_id == row_target.to(tl.float32))
        tl.store(correct + row, hit.to(tl.uint8), mask=inside)


def plan(
    chip: Chip,
    math: RowMath,
    gathered: torch.Tensor,  # [ranks, N, statistics] fp32
    target: torch.Tensor,  # [N] int64
    weight: torch.Tensor,  # [N] fp32
    loss: torch.Tensor,  # [N] fp32; this and all that follow are written
    normalizer: torch.Tensor,  # [N, 2] fp32
    lse: torch.Tensor | None = None,  # [N] fp32; None: no metrics
    log_prob: torch.Tensor | None = None,  # [N] fp32
    correct: torch.Tensor | None = None,  # [N] bool
    entropy: torch.Tensor | None = None,  # [N] fp32
    *,
    scale: torch.Tensor | None = None,  # [N] fp32
) -> list[Launch]:
    """The launch that merges the statistics, in a list."""
    ranks, rows, statistics = gathered.shape
    arguments = {
        "gathered": gathered,
        "target": target,
        "weight": weight,
        "loss": loss,
        "normalizer": normalizer,
        "lse": lse,
        "log_prob": log_prob,
        "correct": None if correct is None else correct.view(torch.uint8),
        "entropy": entropy,
        "rows": rows,
        "ranks": ranks,
        "stride_rank": gathered.stride(0),
        "stride_row": gathered.stride(1),
        "unit": math.unit,
        "scale": scale,
        "vocab_size": float(math.vocab_size),
        "label_smoothing": math.label_smoothing,
        "z_loss": math.z_loss,
        "STATISTICS": statistics,
        "METRICS": log_prob is not None,
        "SMOOTHED": math.label_smoothing > 0,
        "Z_LOSS": math.z_loss > 0,
        "BLOCK": VECTOR_BLOCK,
    }
    grid = triton.cdiv(rows, VECTOR_BLOCK)
    return [Launch(merge_kernel, grid, arguments, vector_options(chip))]

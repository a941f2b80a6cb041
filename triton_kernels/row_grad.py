"""Gradient of the logits, row by row, from the logits and each row's normalizer.

docs/design.md derives it. It is computed in fp32 and rounded once. Each element depends only on its
own logit, so it may overwrite the logits. A row with factor 0 is not read: it gets stored zeros.
"""

import torch
import triton
import triton.language as tl

from ..backends.contract import EntropyGrad, RowFactor
from ..rowmath import RowMath
from .arithmetic import (
    LN2,
    LOG2E,
    cap_and_slope,
    cap_arguments,
    far_from_0,
    load_columns,
    narrow,
    reference_of,
    row_pointer,
    tile_columns,
)
from .launch import Chip, Launch, Shape, aligned, splits


@triton.jit
def grad_tile(
    x,  # [RUNS, THREADS, 8] fp32
    columns,
    own,  # the target's column, in the numbering of `columns`
    unit_log2,  # p = 2^(x * unit_log2 - reference), with x capped first if SOFTCAP
    reference,
    softmax_factor,
    tilt,  # with ENTROPY, softmax_factor is softmax_factor + tilt * log2(p)
    smoothing,
    at_target,  # replaces smoothing at the target
    logit_scale,
    inward,
    cap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """dz/dx * (p * softmax_factor - smoothing); at the target, at_target replaces smoothing.

    The difference is formed in fp32. Without SOFTCAP the factors include dz/dx.
    """
    if SOFTCAP:
        x, slope = cap_and_slope(x, inward, cap, SOFTCAP)
    w = tl.fma(x, unit_log2, -reference)
    p = tl.exp2(w)
    if ENTROPY:  # w may be -inf where p is 0
        softmax_factor = tl.fma(tl.where(p == 0.0, 0.0, w), tilt, softmax_factor)
    grad = tl.fma(p, softmax_factor, tl.where(columns == own, -at_target, -smoothing))
    if SOFTCAP:
        grad *= slope * logit_scale
    return grad


@triton.jit
def factor_of(row, upstream, weight, weight_sum, upstream_stride):
    """The factor of the row's gradient: weight * (upstream / weight_sum), 0 if the weight is 0."""
    factor = tl.load(upstream + row * upstream_stride)
    if weight_sum is not None:
        divisor = tl.load(weight_sum)
        factor = tl.math.div_rn(factor, tl.where(divisor > 0.0, divisor, 1.0))
    if weight is not None:
        row_weight = tl.load(weight + row)
        factor = tl.where(row_weight != 0.0, factor * row_weight, 0.0)
    return factor


@triton.jit
def tilt_of(row, grad_entropy, weight, entropy_stride):
    """The negative upstream gradient of the row's entropy, 0 if the weight is 0."""
    tilt = -tl.load(grad_entropy + row * entropy_stride)
    if weight is not None:
        tilt = tl.where(tl.load(weight + row) != 0.0, tilt, 0.0)
    return tilt


@triton.jit(do_not_specialize=["upstream_stride", "entropy_stride", "seq", "stride_b", "stride_s",
                               "out_stride_b", "out_stride_s", "vocab_start",
                               "splits"])  # fmt: skip
def row_grad_kernel(
    logits,  # row n at (n // seq) * stride_b + (n % seq) * stride_s
    grad,  # row n at (n // seq) * out_stride_b + (n % seq) * out_stride_s; may be the logits
    target,  # [N] int64
    normalizer,  # [N, 2] fp32: maximum x, sum of exp(unit * (x - maximum))
    upstream,  # fp32; gradient of row n's loss at n * upstream_stride
    weight,  # [N] fp32; 0: the row is not read and gets zeros; None: all 1
    weight_sum,  # [1] fp32 divisor of a mean, where 0 counts as 1; None: 1
    upstream_stride: tl.int64,
    grad_entropy,  # fp32; gradient of row n's entropy at n * entropy_stride; None: 0
    entropy,  # [N] fp32; or None
    entropy_stride: tl.int64,
    seq,
    stride_b: tl.int64,
    stride_s: tl.int64,
    out_stride_b: tl.int64,
    out_stride_s: tl.int64,
    width,  # columns, with padding
    valid,  # columns from here on are padding and get 0
    vocab_start: tl.int64,
    splits,  # programs per row
    two_z_loss,
    target_share,  # 1 - label_smoothing
    column_share,  # math.label_smoothing / math.vocab_size
    unit,  # z = unit * x
    scale,  # [N] fp32: takes the place of unit and logit_scale; or None
    logit_scale,
    inward,
    cap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SEGMENT: tl.constexpr,
    RUNS: tl.constexpr,
    THREADS: tl.constexpr,
):
    TILE: tl.constexpr = RUNS * THREADS * 8
    # Start with the last row: forward read it last, so the L2 or Infinity Cache may still hold it.
    # csrc/gpu/row_grad.cuh has the measurement.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = program // splits
    per_part = tl.cdiv(tl.cdiv(width, SEGMENT), splits) * SEGMENT
    # Not clamped, because Triton would then not see that it is a multiple of 16 bytes.
    begin = program % splits * per_part
    end = tl.minimum(begin + per_part, width)
    columns = tile_columns(RUNS, THREADS)
    dtype: tl.constexpr = grad.dtype.element_ty
    grad = row_pointer(grad, row, seq, out_stride_b, out_stride_s, ALIGNED)
    factor = factor_of(row, upstream, weight, weight_sum, upstream_stride)
    constant = factor == 0.0
    tilt = 0.0
    if ENTROPY:
        tilt = tilt_of(row, grad_entropy, weight, entropy_stride)
        constant = constant & (tilt == 0.0)
    if constant:
        zeros = narrow(tl.zeros([RUNS, THREADS, 8], tl.float32), dtype)
        whole = begin + tl.maximum(end - begin, 0) // TILE * TILE
        for first in range(begin, whole, TILE):
            tl.store(grad + first + columns, zeros)
        if whole < end:
            tl.store(grad + whole + columns, zeros, mask=columns < end - whole)
        return
    logits = row_pointer(logits, row, seq, stride_b, stride_s, ALIGNED)
    label = tl.load(target + row)
    own = label - vocab_start
    # If there is no target in this shard, -1: a column that no tile has.
    own = tl.where((label >= 0) & (own >= 0) & (own < valid), own, -1).to(tl.int32)
    normalizer += row.to(tl.int64) * 2
    top = tl.load(normalizer)
    total = tl.load(normalizer + 1)
    if scale is not None:
        unit = tl.load(scale + row)
        logit_scale = unit
    unit_log2 = unit * LOG2E
    unit_log2, reference, rest = reference_of(top, unit_log2, far_from_0(unit_log2))
    softmax_factor = factor * tl.exp2(-rest) / total
    if Z_LOSS:
        softmax_factor *= tl.fma(two_z_loss, tl.fma(top, unit, tl.log(total)), 1.0)
    if ENTROPY:  # docs/design.md derives it
        tilt = tilt * tl.exp2(-rest) / total
        mean = tl.log(total) - tl.load(entropy + row)
        softmax_factor = tl.fma(-tilt, mean + rest * LN2, softmax_factor)
        tilt *= LN2
    smoothing = factor * column_share
    at_target = smoothing + factor * target_share
    if not SOFTCAP:
        softmax_factor *= logit_scale
        tilt *= logit_scale
        smoothing *= logit_scale
        at_target *= logit_scale
    stop = tl.minimum(end, valid)
    whole = begin + tl.maximum(stop - begin, 0) // TILE * TILE
    for first in range(begin, whole, TILE):
        x = load_columns(logits + first, columns, TILE, False)
        value = grad_tile(
            x, columns, own - first, unit_log2, reference, softmax_factor, tilt, smoothing,
            at_target, logit_scale, inward, cap, SOFTCAP, ENTROPY,
        )  # fmt: skip
        tl.store(grad + first + columns, narrow(value, dtype))
    for first in range(whole, end, TILE):
        x = load_columns(logits + first, columns, stop - first, True)
        value = grad_tile(
            x, columns, own - first, unit_log2, reference, softmax_factor, tilt, smoothing,
            at_target, logit_scale, inward, cap, SOFTCAP, ENTROPY,
        )  # fmt: skip
        value = tl.where(columns < stop - first, value, 0.0)
        tl.store(grad + first + columns, narrow(value, dtype), mask=columns < end - first)


def plan(
    chip: Chip,
    shape: Shape,
    math: RowMath,
    logits: torch.Tensor,  # [b, s, v]
    normalizer: torch.Tensor,  # [N, 2] fp32
    target: torch.Tensor,  # [N] int64
    factor: RowFactor,
    out: torch.Tensor,  # [b, s, v], written; may be the logits
    scale: torch.Tensor | None = None,  # [N] fp32
    entropy: EntropyGrad | None = None,
) -> list[Launch]:
    """The launch that fills `out`."""
    rows, columns = target.numel(), logits.shape[-1]
    upstream, weight, weight_sum = factor
    of_entropy, entropies = entropy or (None, None)
    parts_per_row = splits(chip, rows, triton.cdiv(columns, shape.segment))
    arguments = {
        "logits": logits,
        "grad": out,
        "target": target,
        "normalizer": normalizer,
        "upstream": upstream,
        "weight": weight,
        "weight_sum": weight_sum,
        "upstream_stride": upstream.stride(0) if upstream.dim() else 0,
        "grad_entropy": of_entropy,
        "entropy": entropies,
        "entropy_stride": 0 if of_entropy is None else of_entropy.stride(0),
        "seq": logits.shape[1],
        "stride_b": logits.stride(0),
        "stride_s": logits.stride(1),
        "out_stride_b": out.stride(0),
        "out_stride_s": out.stride(1),
        "width": columns,
        "valid": math.valid_columns(columns),
        "vocab_start": math.vocab_start,
        "splits": parts_per_row,
        "two_z_loss": 2.0 * math.z_loss,
        "target_share": 1.0 - math.label_smoothing,
        "column_share": math.label_smoothing / math.vocab_size,
        "unit": math.unit,
        "scale": scale,
        "logit_scale": math.logit_scale,
        **cap_arguments(math),
        "ENTROPY": entropy is not None,
        "ALIGNED": aligned(logits) and aligned(out),
        "Z_LOSS": math.z_loss > 0,
        "SEGMENT": shape.segment,
        "RUNS": shape.runs,
        "THREADS": shape.threads,
    }
    return [Launch(row_grad_kernel, rows * parts_per_row, arguments, shape.options(chip))]

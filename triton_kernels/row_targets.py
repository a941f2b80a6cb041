"""Target and weight of each row, from labels, mask, document boundaries and ignore_index.

One launch, no atomics. Program 0 reads all rows, in a fixed order, for the count and the sum of the
weights. Every other program writes the targets and weights of one block. Labels and masks are a few
bytes per row, so one program can afford to read them all again.
"""

import torch
import triton
import triton.language as tl

from ..scoring import Scoring
from ..targets import Targets
from .arithmetic import NOT_SCORED, OUT_OF_VOCABULARY, widen
from .launch import Chip, Launch, targets_options

#: Rows that a program handles at once. With documents, twice as many rows need more scalar
#: registers, for the masks of their lanes, than AMD GPUs have.
BLOCK = 2048


@triton.jit
def same_document_next(position, mask, cu_seqlens, stride, boundaries, STEPS: tl.constexpr):
    """Whether position and position + 1 lie in one document. Binary search in `cu_seqlens`."""
    low = tl.zeros_like(position)
    high = low + boundaries
    for _ in range(STEPS):  # low becomes the number of boundaries <= position
        middle = (low + high) // 2
        searching = mask & (low < high)
        edge = tl.load(cu_seqlens + middle.to(tl.int64) * stride, mask=searching, other=0)
        right = searching & (edge <= position)
        high = tl.where(searching & (edge > position), middle, high)
        low = tl.where(right, middle + 1, low)
    inside = mask & (low > 0) & (low < boundaries)
    edge = tl.load(cu_seqlens + low.to(tl.int64) * stride, mask=inside, other=0)
    return inside & (edge > position + 1)


@triton.jit
def scored_on(
    row,  # [BLOCK]
    labels,
    loss_mask,  # or None
    cu_seqlens,  # or None
    rows,
    seq,
    labels_stride_b,
    labels_stride_s,
    mask_stride_b,
    mask_stride_s,
    cu_stride,
    boundaries,
    ignore_index,
    vocab_size,
    SHIFT: tl.constexpr,
    STEPS: tl.constexpr,
):
    """(target int64, weight fp32, whether the row is scored) of each row; rows >= N are not."""
    b = (row // seq).to(tl.int64)
    at = (row % seq + SHIFT).to(tl.int64)
    scored = (row < rows) & (at < seq)
    if cu_seqlens is not None:
        scored = same_document_next(row, scored, cu_seqlens, cu_stride, boundaries, STEPS)
    label_at = labels + b * labels_stride_b + at * labels_stride_s
    label = tl.load(label_at, mask=scored, other=0).to(tl.int64)
    scored = scored & (label != ignore_index)
    weight = tl.where(scored, 1.0, 0.0)
    if loss_mask is not None:
        given = tl.load(loss_mask + b * mask_stride_b + at * mask_stride_s, mask=scored, other=0)
        if given.dtype == tl.bfloat16:
            given = widen(given)
        scored = scored & (given != 0)
        weight = tl.where(scored, given.to(tl.float32), 0.0)
    known = (label >= 0) & (label < vocab_size)
    target = tl.where(known, label, OUT_OF_VOCABULARY)
    return tl.where(scored, target, NOT_SCORED), weight, scored


@triton.jit(do_not_specialize=["rows", "seq", "labels_stride_b", "labels_stride_s", "cu_stride",
                               "mask_stride_b", "mask_stride_s", "boundaries", "ignore_index",
                               "vocab_size"])  # fmt: skip
def row_targets_kernel(
    labels,  # any integer dtype; (b, s) at b * labels_stride_b + s * labels_stride_s
    loss_mask,  # any dtype (bool as uint8), or None; (b, s) likewise, with its own strides
    cu_seqlens,  # [boundaries] int32 or int64, or None
    target,  # [N] int64
    weight,  # [N] fp32
    count,  # [1] int32
    weight_sum,  # [1] fp32
    rows,
    seq,
    labels_stride_b: tl.int64,
    labels_stride_s: tl.int64,
    mask_stride_b: tl.int64,
    mask_stride_s: tl.int64,
    cu_stride: tl.int64,
    boundaries,
    ignore_index: tl.int64,
    vocab_size: tl.int64,
    SHIFT: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        total = tl.zeros([BLOCK], tl.float32)
        counted = tl.zeros([BLOCK], tl.int32)
        for first in range(0, rows, BLOCK):
            _target, row_weight, scored = scored_on(
                first + lane, labels, loss_mask, cu_seqlens, rows, seq, labels_stride_b,
                labels_stride_s, mask_stride_b, mask_stride_s, cu_stride, boundaries, ignore_index,
                vocab_size, SHIFT, STEPS,
            )  # fmt: skip
            total += row_weight
            counted += scored.to(tl.int32)
        tl.store(count, tl.sum(counted, 0))
        tl.store(weight_sum, tl.sum(total, 0))
    else:
        row = (tl.program_id(0) - 1) * BLOCK + lane
        row_target, row_weight, _scored = scored_on(
            row, labels, loss_mask, cu_seqlens, rows, seq, labels_stride_b, labels_stride_s,
            mask_stride_b, mask_stride_s, cu_stride, boundaries, ignore_index, vocab_size,
            SHIFT, STEPS,
        )  # fmt: skip
        tl.store(target + row, row_target, mask=row < rows)
        tl.store(weight + row, row_weight, mask=row < rows)


def plan(
    chip: Chip,
    scoring: Scoring,
    vocab_size: int,
    found: Targets,  # written
) -> list[Launch]:
    """The launch that fills `found`, in a list."""
    labels, loss_mask, cu_seqlens, shift, ignore_index, _per_sample = scoring
    if loss_mask is not None and loss_mask.dtype == torch.bool:
        loss_mask = loss_mask.view(torch.uint8)
    if not shift:
        cu_seqlens = None
    boundaries = 0 if cu_seqlens is None else cu_seqlens.numel()
    labels_b, labels_s = row_strides(labels)
    mask_b, mask_s = (0, 0) if loss_mask is None else row_strides(loss_mask)
    rows = labels.numel()
    arguments = {
        "labels": labels,
        "loss_mask": loss_mask,
        "cu_seqlens": cu_seqlens,
        **found._asdict(),
        "rows": rows,
        "seq": labels.shape[-1],
        "labels_stride_b": labels_b,
        "labels_stride_s": labels_s,
        "mask_stride_b": mask_b,
        "mask_stride_s": mask_s,
        "cu_stride": 0 if cu_seqlens is None else cu_seqlens.stride(0),
        "boundaries": boundaries,
        "ignore_index": ignore_index,
        "vocab_size": vocab_size,
        "SHIFT": int(shift),
        "STEPS": boundaries.bit_length(),
        "BLOCK": BLOCK,
    }
    grid = 1 + triton.cdiv(rows, BLOCK)
    return [Launch(row_targets_kernel, grid, arguments, targets_options(chip))]


def row_strides(tensor: torch.Tensor) -> tuple[int, int]:
    """Strides of batch and position of a `[b, s]` or `[n]` tensor."""
    return tensor.stride() if tensor.dim() == 2 else (0, tensor.stride(0))

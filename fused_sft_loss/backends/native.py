"""The compiled kernels in csrc/, and the sole importer of them: tensors in, addresses out."""

import torch
from torch import Tensor

from .. import _cpu
from ..rowmath import RowMath
from ..targets import Targets
from .eager import merge_metrics

#: Version, compiler, instruction sets and the one in use, threading; and how tests choose another.
build_info, isas, use_isa = _cpu.build_info, _cpu.isas, _cpu.use_isa

__all__ = [
    "build_info",
    "isas",
    "merge",
    "merge_metrics",
    "row_grad",
    "row_stats",
    "row_targets",
    "use_isa",
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of csrc/args.h


def strided_rows(tensor: Tensor, math: RowMath) -> _cpu.Rows:
    """Describe `[b, s, v]` as csrc's Rows. The caller keeps the tensor alive."""
    batch, seq, columns = tensor.shape
    return _cpu.Rows(
        data=tensor.data_ptr(),
        dtype=DTYPES[tensor.dtype],
        batch=batch,
        seq=seq,
        columns=columns,
        valid=math.valid_columns(columns),
        stride_b=tensor.stride(0),
        stride_s=tensor.stride(1),
    )


def row_targets(
    labels: Tensor,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    vocab_size: int,
) -> Targets:
    labels = torch.atleast_2d(labels.long())
    mask = None if loss_mask is None else torch.atleast_2d(loss_mask.float())
    bounds = None if cu_seqlens is None else cu_seqlens.long().contiguous()
    batch, seq = labels.shape
    result = Targets.empty(labels)
    _cpu.row_targets(
        labels=labels.data_ptr(),
        mask=0 if mask is None else mask.data_ptr(),
        cu_seqlens=0 if bounds is None else bounds.data_ptr(),
        batch=batch,
        seq=seq,
        boundaries=0 if bounds is None else bounds.numel(),
        label_stride_b=labels.stride(0),
        label_stride_s=labels.stride(1),
        mask_stride_b=0 if mask is None else mask.stride(0),
        mask_stride_s=0 if mask is None else mask.stride(1),
        shift=shift,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        target=result.target.data_ptr(),
        weight=result.weight.data_ptr(),
        count=result.count.data_ptr(),
        weight_sum=result.weight_sum.data_ptr(),
    )
    return result


def merge(gathered: Tensor, target: Tensor, weight: Tensor, math: RowMath) -> tuple[Tensor, Tensor]:
    ranks, rows, columns = gathered.shape
    loss, lse = torch.empty_like(weight), torch.empty_like(weight)
    _cpu.merge(
        stats=gathered.data_ptr(),
        ranks=ranks,
        rows=rows,
        columns=columns,
        rank_stride=gathered.stride(0),
        target=target.data_ptr(),
        weight=weight.data_ptr(),
        label_smoothing=math.label_smoothing,
        z_loss=math.z_loss,
        vocab_size=math.vocab_size,
        loss=loss.data_ptr(),
        lse=lse.data_ptr(),
    )
    return loss, lse


def row_stats(
    logits: Tensor, target: Tensor, weight: Tensor, math: RowMath, columns: int
) -> Tensor:
    stats = torch.empty(weight.numel(), columns)
    _cpu.row_stats(
        logits=strided_rows(logits, math),
        logit_scale=math.logit_scale,
        softcap=math.softcap,
        target=target.data_ptr(),
        weight=weight.data_ptr(),
        vocab_start=math.vocab_start,
        columns=columns,
        stats=stats.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return stats


def row_grad(
    logits: Tensor, lse: Tensor, target: Tensor, scale: Tensor, math: RowMath, out: Tensor
) -> None:
    _cpu.row_grad(
        logits=strided_rows(logits, math),
        grad=strided_rows(out, math),
        logit_scale=math.logit_scale,
        softcap=math.softcap,
        target=target.data_ptr(),
        lse=lse.data_ptr(),
        scale=scale.data_ptr(),
        vocab_start=math.vocab_start,
        label_smoothing=math.label_smoothing,
        z_loss=math.z_loss,
        vocab_size=math.vocab_size,
        threads=torch.get_num_threads(),
    )

"""The compiled kernels in csrc/, and the sole importer of them: tensors in, addresses out."""

import torch
from torch import Tensor

from .. import _cpu
from ..rowmath import RowMath
from .eager import merge, merge_metrics, row_targets  # vectors of N rows: torch's own operators do

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


def rows(tensor: Tensor, math: RowMath) -> _cpu.Rows:
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


def row_stats(
    logits: Tensor, target: Tensor, weight: Tensor, math: RowMath, columns: int
) -> Tensor:
    stats = torch.empty(weight.numel(), columns)
    _cpu.row_stats(
        logits=rows(logits, math),
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
        logits=rows(logits, math),
        grad=rows(out, math),
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

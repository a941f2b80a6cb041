"""Tensors as the compiled modules take them: addresses, strides and numbers.

The argument classes here are those of csrc/bindings.h, the same in every module. Whoever passes
them keeps the tensors alive.
"""

from types import ModuleType

import torch
from torch import Tensor

from ..rowmath import RowMath
from ..targets import Targets

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of csrc/args.h


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def rows(module: ModuleType, tensor: Tensor, math: RowMath):
    """`[b, s, v]` as the module's Rows."""
    batch, seq, columns = tensor.shape
    return module.Rows(
        data=tensor.data_ptr(),
        dtype=DTYPES[tensor.dtype],
        batch=batch,
        seq=seq,
        columns=columns,
        valid=math.valid_columns(columns),
        stride_b=tensor.stride(0),
        stride_s=tensor.stride(1),
    )


def plain(
    labels: Tensor, loss_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The three in the dtypes the modules read, labels and mask as `[b, s]`; copies only if need
    be."""
    return (
        torch.atleast_2d(labels.long()),
        None if loss_mask is None else torch.atleast_2d(loss_mask.float()),
        None if cu_seqlens is None else cu_seqlens.long().contiguous(),
    )


def targets_args(
    module: ModuleType,
    labels: Tensor,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    result: Targets,
    *,
    shift: bool,
    ignore_index: int,
    vocab_size: int,
):
    """From what `plain` gives."""
    batch, seq = labels.shape
    mask_strides = (0, 0) if loss_mask is None else loss_mask.stride()
    return module.TargetsArgs(
        labels=labels.data_ptr(),
        mask=address(loss_mask),
        cu_seqlens=address(cu_seqlens),
        batch=batch,
        seq=seq,
        boundaries=0 if cu_seqlens is None else cu_seqlens.numel(),
        label_stride_b=labels.stride(0),
        label_stride_s=labels.stride(1),
        mask_stride_b=mask_strides[0],
        mask_stride_s=mask_strides[1],
        shift=shift,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        target=result.target.data_ptr(),
        weight=result.weight.data_ptr(),
        count=result.count.data_ptr(),
        weight_sum=result.weight_sum.data_ptr(),
    )


def losses_like(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Memory of the loss `[N]` and the normalizer `[N, 2]` of rows with weights `[N]`."""
    return torch.empty_like(weight), weight.new_empty(weight.numel(), 2)


def stats_args(
    module: ModuleType, logits: Tensor, target: Tensor, weight: Tensor, stats: Tensor, math: RowMath
):
    return module.StatsArgs(
        logits=rows(module, logits, math),
        target=target.data_ptr(),
        weight=weight.data_ptr(),
        columns=stats.shape[1],
        stats=stats.data_ptr(),
        **_of_a_shard(math),
    )


def merge_args(
    module: ModuleType,
    gathered: Tensor,
    target: Tensor,
    weight: Tensor,
    math: RowMath,
    loss: Tensor,
    normalizer: Tensor,
):
    ranks, row_count, columns = gathered.shape
    return module.MergeArgs(
        stats=gathered.data_ptr(),
        ranks=ranks,
        rows=row_count,
        columns=columns,
        rank_stride=gathered.stride(0),
        target=target.data_ptr(),
        weight=weight.data_ptr(),
        loss=loss.data_ptr(),
        normalizer=normalizer.data_ptr(),
        unit=math.unit,
        **_of_the_loss(math),
    )


def grad_args(
    module: ModuleType,
    logits: Tensor,
    normalizer: Tensor,
    target: Tensor,
    scale: Tensor,
    math: RowMath,
    out: Tensor,
    stored: Tensor | None = None,
):
    return module.GradArgs(
        logits=rows(module, logits, math),
        grad=rows(module, out, math),
        target=target.data_ptr(),
        normalizer=normalizer.data_ptr(),
        scale=scale.data_ptr(),
        stored=address(stored),
        **_of_a_shard(math),
        **_of_the_loss(math),
    )


def stats_grad_args(
    module: ModuleType,
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    scale: Tensor,
    math: RowMath,
    out: Tensor,
    loss: Tensor,
    normalizer: Tensor,
):
    return module.StatsGradArgs(
        grad=grad_args(module, logits, normalizer, target, scale, math, out),
        weight=weight.data_ptr(),
        loss=loss.data_ptr(),
        normalizer=normalizer.data_ptr(),
    )


def rescale_args(module: ModuleType, grad: Tensor, scale: Tensor, stored: Tensor, math: RowMath):
    return module.RescaleArgs(
        grad=rows(module, grad, math), scale=scale.data_ptr(), stored=stored.data_ptr()
    )


def _of_a_shard(math: RowMath) -> dict:
    """What makes z of a shard's logits."""
    return {
        "logit_scale": math.logit_scale,
        "softcap": math.softcap,
        "vocab_start": math.vocab_start,
    }


def _of_the_loss(math: RowMath) -> dict:
    """What makes a loss of all shards' z."""
    return {
        "label_smoothing": math.label_smoothing,
        "z_loss": math.z_loss,
        "vocab_size": math.vocab_size,
    }

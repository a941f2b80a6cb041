"""Convert tensors to what the compiled modules take: tuples of addresses, strides and numbers.

Each tuple holds the fields of one struct of csrc/bindings.h or csrc/args.h, in their order. It does
not own the tensors: the caller keeps them alive.
"""

import torch
from torch import Tensor

from ..scoring import Scoring
from ..targets import Targets
from .contract import EntropyGrad, RowFactor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of csrc/args.h


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def rows(tensor: Tensor) -> tuple:
    """struct Tensor3 of logits or their gradient, `[b, s, v]`."""
    return (tensor.data_ptr(), DTYPES[tensor.dtype], *tensor.shape, *tensor.stride()[:2])


def in_dtypes(scoring: Scoring) -> Scoring:
    """Convert to the dtypes that the modules read, labels and mask to `[b, s]`. Copies only what
    differs."""
    labels, loss_mask, cu_seqlens = scoring[:3]
    return scoring._replace(
        labels=_in_two_dimensions(labels.long()),
        loss_mask=None if loss_mask is None else _in_two_dimensions(loss_mask.float()),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long().contiguous(),
    )


def _in_two_dimensions(tensor: Tensor) -> Tensor:
    """`[n]` as `[1, n]`. (torch.atleast_2d takes the host longer.)"""
    return tensor if tensor.dim() == 2 else tensor.unsqueeze(0)


def targets(scoring: Scoring, vocab_size: int, found: Targets) -> tuple:
    """struct TargetsArgs of a Scoring that `in_dtypes` returned."""
    labels, loss_mask, cu_seqlens, shift, ignore_index, _per_sample = scoring
    return (
        labels.data_ptr(),
        address(loss_mask),
        address(cu_seqlens),
        *labels.shape,
        0 if cu_seqlens is None else cu_seqlens.numel(),
        *labels.stride(),
        *((0, 0) if loss_mask is None else loss_mask.stride()),
        shift,
        ignore_index,
        vocab_size,
        found.target.data_ptr(),
        found.weight.data_ptr(),
        found.count.data_ptr(),
        found.weight_sum.data_ptr(),
    )


def gathered(stats: Tensor) -> tuple:
    """struct Gathered of statistics `[ranks, N, statistics]`."""
    return (stats.data_ptr(), *stats.shape, stats.stride(0))


def row_factor(factor: RowFactor) -> tuple:
    """struct RowFactor."""
    grad, weight, weight_sum = factor
    return *_per_row(grad), address(weight), address(weight_sum)


def entropy_grad(entropy: EntropyGrad | None) -> tuple:
    """struct EntropyGrad."""
    return (0, 0, 0) if entropy is None else (*_per_row(entropy.grad), entropy.entropy.data_ptr())


def _per_row(values: Tensor) -> tuple[int, int]:
    """Address and stride of a number for each row, or of one for all rows."""
    return values.data_ptr(), values.stride(0) if values.dim() else 0

"""The compiled CPU kernels of csrc/: tensors in, addresses out."""

import torch
from torch import Tensor

from .. import _cpu
from ..rowmath import RowMath
from ..targets import Targets
from . import addresses
from .eager import merge_metrics

#: Version, compiler, instruction sets and the one in use, threading; and how tests choose another.
build_info, isas, use_isa = _cpu.build_info, _cpu.isas, _cpu.use_isa

__all__ = [
    "build_info",
    "isas",
    "merge",
    "merge_metrics",
    "row_grad",
    "row_rescale",
    "row_stats",
    "row_stats_grad",
    "row_targets",
    "use_isa",
]


def row_targets(
    labels: Tensor,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    vocab_size: int,
) -> Targets:
    given = addresses.plain(labels, loss_mask, cu_seqlens)
    result = Targets.empty(given[0])
    args = addresses.targets_args(
        _cpu, *given, result, shift=shift, ignore_index=ignore_index, vocab_size=vocab_size
    )
    _cpu.row_targets(args)
    return result


def row_stats(
    logits: Tensor, target: Tensor, weight: Tensor, math: RowMath, columns: int
) -> Tensor:
    stats = torch.empty(weight.numel(), columns, dtype=torch.float32, device=weight.device)
    args = addresses.stats_args(_cpu, logits, target, weight, stats, math)
    _cpu.row_stats(args, threads=torch.get_num_threads())
    return stats


def merge(gathered: Tensor, target: Tensor, weight: Tensor, math: RowMath) -> tuple[Tensor, Tensor]:
    results = addresses.losses_like(weight)
    _cpu.merge(addresses.merge_args(_cpu, gathered, target, weight, math, *results))
    return results


def row_grad(
    logits: Tensor,
    normalizer: Tensor,
    target: Tensor,
    scale: Tensor,
    math: RowMath,
    out: Tensor,
    stored: Tensor | None = None,
) -> None:
    args = addresses.grad_args(_cpu, logits, normalizer, target, scale, math, out, stored)
    _cpu.row_grad(args, threads=torch.get_num_threads())


def row_stats_grad(
    logits: Tensor, target: Tensor, weight: Tensor, scale: Tensor, math: RowMath, out: Tensor
) -> tuple[Tensor, Tensor]:
    results = addresses.losses_like(weight)
    args = addresses.stats_grad_args(_cpu, logits, target, weight, scale, math, out, *results)
    _cpu.row_stats_grad(args, threads=torch.get_num_threads())
    return results


def row_rescale(grad: Tensor, scale: Tensor, stored: Tensor, math: RowMath) -> None:
    args = addresses.rescale_args(_cpu, grad, scale, stored, math)
    _cpu.row_rescale(args, threads=torch.get_num_threads())

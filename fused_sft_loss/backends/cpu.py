"""The backend "cpu": passes the addresses of tensors to the compiled kernels of csrc/cpu."""

import torch
from torch import Tensor

from .. import _cpu  # type: ignore[attr-defined]  # compiled
from ..rowmath import RowMath
from ..scoring import Scoring
from ..targets import Targets
from . import arguments
from .contract import (
    REDUCTIONS,
    EntropyGrad,
    Losses,
    RowFactor,
    losses_like,
    normalizer_like,
    result_like,
)
from .eager import merge_metrics

#: Version, compiler, instruction sets (fastest first) and the one in use, threading.
build_info = _cpu.build_info

__all__ = [
    "build_info",
    "loss",
    "merge",
    "merge_metrics",
    "reduce",
    "row_grad",
    "row_regrad",
    "row_rescale",
    "row_stats",
    "row_stats_grad",
    "row_targets",
]


def row_targets(scoring: Scoring, vocab_size: int) -> Targets:
    scoring = arguments.in_dtypes(scoring)
    found = Targets.empty(scoring.labels)
    _cpu.row_targets(arguments.targets(scoring, vocab_size, found))
    return found


def loss(scoring: Scoring, logits: Tensor, math: RowMath, reduction: str) -> Losses:
    checked = scoring.checked
    if checked and scoring.cu_seqlens is not None:
        scoring._replace(loss_mask=None).check_values()
    given = arguments.in_dtypes(scoring.read())
    found = Targets.empty(given.labels)
    normalizer = normalizer_like(found.weight)
    result = result_like(found.weight, reduction)
    faults = _cpu.loss(
        arguments.targets(given, math.vocab_size, found),
        arguments.rows(logits),
        math,
        normalizer.data_ptr(),
        REDUCTIONS.index(reduction),
        result.data_ptr(),
        torch.get_num_threads(),
    )
    if checked and faults:
        scoring.check_values()
        scoring.check_labels(found.target, math.vocab_size)
    return Losses.of(result, found, normalizer)


def row_stats(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    math: RowMath,
    statistics: int,
    scale: Tensor | None = None,
) -> Tensor:
    stats = weight.new_empty(weight.numel(), statistics)
    _cpu.row_stats(
        arguments.rows(logits),
        math,
        target.data_ptr(),
        weight.data_ptr(),
        statistics,
        stats.data_ptr(),
        arguments.address(scale),
        torch.get_num_threads(),
    )
    return stats


def merge(
    gathered: Tensor, target: Tensor, weight: Tensor, math: RowMath, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    losses, normalizer = losses_like(weight)
    _cpu.merge(
        arguments.gathered(gathered),
        math,
        target.data_ptr(),
        weight.data_ptr(),
        losses.data_ptr(),
        normalizer.data_ptr(),
        arguments.address(scale),
    )
    return losses, normalizer


def reduce(losses: Tensor, weight_sum: Tensor | None) -> Tensor:
    result = losses.new_empty(())
    _cpu.reduce(losses.data_ptr(), losses.numel(), arguments.address(weight_sum), result.data_ptr())
    return result


def row_grad(
    logits: Tensor,
    normalizer: Tensor,
    target: Tensor,
    factor: RowFactor,
    math: RowMath,
    out: Tensor,
    stored: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    entropy: EntropyGrad | None = None,
) -> None:
    _cpu.row_grad(
        arguments.rows(logits),
        arguments.rows(out),
        math,
        target.data_ptr(),
        normalizer.data_ptr(),
        arguments.row_factor(factor),
        arguments.address(stored),
        arguments.address(scale),
        arguments.entropy_grad(entropy),
        torch.get_num_threads(),
    )


row_regrad = row_grad


def row_stats_grad(
    logits: Tensor, target: Tensor, weight: Tensor, factor: Tensor, math: RowMath, out: Tensor
) -> tuple[Tensor, Tensor]:
    losses, normalizer = losses_like(weight)
    _cpu.row_stats_grad(
        arguments.rows(logits),
        arguments.rows(out),
        math,
        target.data_ptr(),
        weight.data_ptr(),
        arguments.row_factor(RowFactor(factor)),
        losses.data_ptr(),
        normalizer.data_ptr(),
        torch.get_num_threads(),
    )
    return losses, normalizer


def row_rescale(grad: Tensor, factor: RowFactor, stored: Tensor, math: RowMath) -> None:
    _cpu.row_rescale(
        arguments.rows(grad),
        math,
        arguments.row_factor(factor),
        stored.data_ptr(),
        torch.get_num_threads(),
    )

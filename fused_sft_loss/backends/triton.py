"""The Triton kernels on NVIDIA and AMD GPUs, and in Triton's interpreter on CPU tensors."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..rowmath import RowMath
from ..scoring import Scoring
from ..targets import Targets
from ..triton_kernels import merge as merge_kernels
from ..triton_kernels import reduce as reduce_kernels
from ..triton_kernels import row_grad as row_grad_kernels
from ..triton_kernels import row_stats as row_stats_kernels
from ..triton_kernels import row_targets as row_targets_kernels
from ..triton_kernels.launch import INTERPRETED as _INTERPRETED
from ..triton_kernels.launch import Launch, Shape, chip_of
from ..triton_kernels.tune import choose
from .contract import EntropyGrad, RowFactor, losses_like
from .current_device import on

__all__ = [
    "INTERPRETED",
    "merge",
    "merge_metrics",
    "reduce",
    "row_grad",
    "row_stats",
    "row_targets",
]

INTERPRETED: bool = _INTERPRETED.value  # decided when Triton is imported, by TRITON_INTERPRET=1


def row_targets(scoring: Scoring, vocab_size: int) -> Targets:
    labels = scoring.labels
    found = Targets.empty(labels)
    _run(labels, row_targets_kernels.plan(chip_of(labels.device), scoring, vocab_size, found))
    return found


def row_stats(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    math: RowMath,
    statistics: int,
    scale: Tensor | None = None,
) -> Tensor:
    chip = chip_of(logits.device)
    stats = weight.new_empty(weight.numel(), statistics)

    def launch(shape: Shape) -> None:
        plan = row_stats_kernels.plan(chip, shape, math, logits, target, weight, stats, scale)
        _run(logits, plan)

    name = row_stats_kernels.table_name(statistics, math.softcap)
    launch(choose(chip, name, logits, launch))
    return stats


def merge(
    gathered: Tensor, target: Tensor, weight: Tensor, math: RowMath, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    results = losses_like(weight)
    _merge(gathered, target, weight, math, scale, results)
    return results


def merge_metrics(
    gathered: Tensor, target: Tensor, weight: Tensor, math: RowMath, scale: Tensor | None = None
) -> tuple[Tensor, ...]:
    loss, normalizer = losses_like(weight)
    lse, log_prob, entropy = (torch.empty_like(weight) for _ in range(3))
    correct = torch.empty_like(weight, dtype=torch.bool)
    results = loss, normalizer, lse, log_prob, correct, entropy
    _merge(gathered, target, weight, math, scale, results)
    return loss, log_prob, lse, correct, entropy


def reduce(losses: Tensor, weight_sum: Tensor | None) -> Tensor:
    result = losses.new_empty(())
    _run(losses, reduce_kernels.plan(chip_of(losses.device), losses, weight_sum, result))
    return result


def row_grad(
    logits: Tensor,
    normalizer: Tensor,
    target: Tensor,
    factor: RowFactor,
    math: RowMath,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    entropy: EntropyGrad | None = None,
) -> None:
    chip = chip_of(logits.device)

    def launch(shape: Shape, out: Tensor = out) -> None:
        arguments = logits, normalizer, target, factor, out, scale, entropy
        _run(logits, row_grad_kernels.plan(chip, shape, math, *arguments))

    # Autotuning runs the kernel repeatedly, so it writes to a scratch tensor; in-place logits would
    # be destroyed.
    launch(choose(chip, "row_grad", logits, lambda shape: launch(shape, torch.empty_like(logits))))


def _merge(
    gathered: Tensor,
    target: Tensor,
    weight: Tensor,
    math: RowMath,
    scale: Tensor | None,
    results: tuple[Tensor, ...],
) -> None:
    chip = chip_of(weight.device)
    _run(weight, merge_kernels.plan(chip, math, gathered, target, weight, *results, scale=scale))


def _run(tensor: Tensor, launches: Iterable[Launch]) -> None:
    """Launch on the tensor's device, even if another is current, and on its current stream."""
    with on(tensor.device):
        for launch in launches:
            launch.run()

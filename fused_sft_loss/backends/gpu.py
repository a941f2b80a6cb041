"""The backends "cuda" and "hip": the compiled kernels of csrc/gpu, in ``_cuda`` and ``_hip``.

One class serves both, because their differences are compiled into the modules. Every launch goes to
the current stream of the tensors' device, even if another device is current.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

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
    statistics_for,
)
from .current_device import on, stream


@cache
def device_chip(device: torch.device) -> tuple[int, int]:
    """(generation, multiprocessors) of a device: struct Chip of csrc/gpu/launch.h.

    Reads properties that torch has cached, so nothing is synchronised.
    """
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.partition(":")[0]  # "gfx942:sramecc+:xnack-"
        return int(name.removeprefix("gfx"), 16), properties.multi_processor_count
    return 10 * properties.major + properties.minor, properties.multi_processor_count


class Gpu:
    """A backend (see ``contract.py``) that calls a compiled module."""

    def __init__(
        self, module: ModuleType, chip_of: Callable[[torch.device], tuple[int, int]] = device_chip
    ):
        self.module = module
        self.chip_of = chip_of
        self.build_info = module.build_info

    def row_targets(self, scoring: Scoring, vocab_size: int) -> Targets:
        scoring = arguments.in_dtypes(scoring)
        found = Targets.empty(scoring.labels)
        device = scoring.labels.device
        with on(device):
            self.module.row_targets(arguments.targets(scoring, vocab_size, found), stream(device))
        return found

    def loss(self, scoring: Scoring, logits: Tensor, math: RowMath, reduction: str) -> Losses:
        checked = scoring.checked
        if checked:
            scoring.check_values()
        given, device = arguments.in_dtypes(scoring.read()), logits.device
        found, rows, chip = (
            Targets.empty(given.labels),
            arguments.rows(logits),
            self.chip_of(device),
        )
        normalizer = normalizer_like(found.weight)
        result = result_like(found.weight, reduction)
        scratch = result.new_empty(self.module.loss_scratch(rows, math, chip))
        with on(device):
            self.module.loss(
                arguments.targets(given, math.vocab_size, found),
                rows,
                math,
                normalizer.data_ptr(),
                REDUCTIONS.index(reduction),
                result.data_ptr(),
                scratch.data_ptr(),
                chip,
                stream(device),
            )
        if checked:
            scoring.check_labels(found.target, math.vocab_size)
        return Losses.of(result, found, normalizer)

    def row_stats(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        math: RowMath,
        statistics: int,
        scale: Tensor | None = None,
    ) -> Tensor:
        rows, chip = arguments.rows(logits), self.chip_of(logits.device)
        stats = weight.new_empty(weight.numel(), statistics)
        needed = self.module.row_stats_parts(rows, math, statistics, chip)
        parts = stats.new_empty(needed) if needed else None
        with on(logits.device):
            self.module.row_stats(
                rows,
                math,
                target.data_ptr(),
                weight.data_ptr(),
                statistics,
                stats.data_ptr(),
                arguments.address(parts),
                arguments.address(scale),
                chip,
                stream(logits.device),
            )
        return stats

    def merge(
        self,
        gathered: Tensor,
        target: Tensor,
        weight: Tensor,
        math: RowMath,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        results = losses_like(weight)
        self._merge(gathered, target, weight, math, scale, results)
        return results

    def merge_metrics(
        self,
        gathered: Tensor,
        target: Tensor,
        weight: Tensor,
        math: RowMath,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        results = loss, _ = losses_like(weight)
        lse, log_prob, entropy = (torch.empty_like(weight) for _ in range(3))
        correct = torch.empty_like(weight, dtype=torch.bool)
        metrics = lse, log_prob, correct, entropy
        self._merge(gathered, target, weight, math, scale, results, *metrics)
        return loss, log_prob, lse, correct, entropy

    def reduce(self, losses: Tensor, weight_sum: Tensor | None) -> Tensor:
        result = losses.new_empty(())
        with on(losses.device):
            self.module.reduce(
                losses.data_ptr(),
                losses.numel(),
                arguments.address(weight_sum),
                result.data_ptr(),
                stream(losses.device),
            )
        return result

    def row_grad(
        self,
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
        self._launch(
            self.module.row_grad,
            logits.device,
            arguments.rows(logits),
            arguments.rows(out),
            math,
            target.data_ptr(),
            normalizer.data_ptr(),
            arguments.row_factor(factor),
            arguments.address(stored),
            arguments.address(scale),
            arguments.entropy_grad(entropy),
        )

    row_regrad = row_grad

    def row_stats_grad(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        factor: Tensor,
        math: RowMath,
        out: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if not self.module.one_read_gains(math):
            stats = self.row_stats(logits, target, weight, math, statistics_for(math))
            losses, normalizer = self.merge(stats.unsqueeze(0), target, weight, math)
            self.row_grad(logits, normalizer, target, RowFactor(factor), math, out)
            return losses, normalizer
        losses, normalizer = losses_like(weight)
        self._launch(
            self.module.row_stats_grad,
            logits.device,
            arguments.rows(logits),
            arguments.rows(out),
            math,
            target.data_ptr(),
            weight.data_ptr(),
            arguments.row_factor(RowFactor(factor)),
            losses.data_ptr(),
            normalizer.data_ptr(),
        )
        return losses, normalizer

    def row_rescale(self, grad: Tensor, factor: RowFactor, stored: Tensor, math: RowMath) -> None:
        self._launch(
            self.module.row_rescale,
            grad.device,
            arguments.rows(grad),
            math,
            arguments.row_factor(factor),
            stored.data_ptr(),
        )

    def _launch(self, function: Callable, device: torch.device, *args: Any) -> None:
        with on(device):
            function(*args, self.chip_of(device), stream(device))

    def _merge(
        self,
        gathered: Tensor,
        target: Tensor,
        weight: Tensor,
        math: RowMath,
        scale: Tensor | None,
        results: tuple[Tensor, Tensor],
        *metrics: Tensor,
    ) -> None:
        losses, normalizer = results
        with on(weight.device):
            self.module.merge(
                arguments.gathered(gathered),
                math,
                target.data_ptr(),
                weight.data_ptr(),
                losses.data_ptr(),
                normalizer.data_ptr(),
                *(map(arguments.address, metrics or (None,) * 4)),
                arguments.address(scale),
                stream(weight.device),
            )

"""The compiled kernels of csrc/ on NVIDIA (``_cuda``) and AMD (``_hip``) GPUs.

One class for both: what differs is compiled into the module it is given. Every launch goes to the
current stream of the tensors' device, whichever device is current.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..rowmath import RowMath
from ..targets import Targets
from . import addresses


@cache
def device_chip(device: torch.device) -> tuple[int, int]:
    """(generation, multiprocessors) of a device, as csrc/gpu/launch.h names them.

    From properties that torch has cached: nothing is synchronised.
    """
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.partition(":")[0]  # "gfx942:sramecc+:xnack-"
        return int(name.removeprefix("gfx"), 16), properties.multi_processor_count
    return 10 * properties.major + properties.minor, properties.multi_processor_count


class Gpu:
    """A backend (see ``backends/__init__.py``) over a compiled module."""

    def __init__(self, module: ModuleType, chip_of: Callable = device_chip):
        self.module = module
        self.chip_of = chip_of
        self.build_info = module.build_info

    def row_targets(
        self,
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
            self.module,
            *given,
            result,
            shift=shift,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
        )
        with _on(labels.device):
            self.module.row_targets(args, stream=_stream(labels.device))
        return result

    def row_stats(
        self, logits: Tensor, target: Tensor, weight: Tensor, math: RowMath, columns: int
    ) -> Tensor:
        chip = self._chip(logits.device)
        stats = weight.new_empty(weight.numel(), columns)
        args = addresses.stats_args(self.module, logits, target, weight, stats, math)
        needed = self.module.row_stats_parts(args, chip=chip)
        parts = stats.new_empty(needed) if needed else None
        with _on(logits.device):
            self.module.row_stats(
                args,
                parts=addresses.address(parts),
                chip=chip,
                stream=_stream(logits.device),
            )
        return stats

    def merge(
        self, gathered: Tensor, target: Tensor, weight: Tensor, math: RowMath
    ) -> tuple[Tensor, Tensor]:
        results = addresses.losses_like(weight)
        self._merge(gathered, target, weight, math, results)
        return results

    def merge_metrics(
        self, gathered: Tensor, target: Tensor, weight: Tensor, math: RowMath
    ) -> tuple[Tensor, ...]:
        results = loss, _ = addresses.losses_like(weight)
        lse, log_prob, entropy = (torch.empty_like(weight) for _ in range(3))
        correct = torch.empty_like(weight, dtype=torch.bool)
        self._merge(gathered, target, weight, math, results, lse, log_prob, correct, entropy)
        return loss, log_prob, lse, correct, entropy

    def row_grad(
        self,
        logits: Tensor,
        normalizer: Tensor,
        target: Tensor,
        scale: Tensor,
        math: RowMath,
        out: Tensor,
        stored: Tensor | None = None,
    ) -> None:
        args = addresses.grad_args(
            self.module, logits, normalizer, target, scale, math, out, stored
        )
        self._launch(self.module.row_grad, args, logits.device)

    def row_stats_grad(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        scale: Tensor,
        math: RowMath,
        out: Tensor,
    ) -> tuple[Tensor, Tensor]:
        results = addresses.losses_like(weight)
        args = addresses.stats_grad_args(
            self.module, logits, target, weight, scale, math, out, *results
        )
        self._launch(self.module.row_stats_grad, args, logits.device)
        return results

    def row_rescale(self, grad: Tensor, scale: Tensor, stored: Tensor, math: RowMath) -> None:
        args = addresses.rescale_args(self.module, grad, scale, stored, math)
        self._launch(self.module.row_rescale, args, grad.device)

    def _launch(self, function: Callable, args, device: torch.device) -> None:
        with _on(device):
            function(args, chip=self._chip(device), stream=_stream(device))

    def _merge(
        self,
        gathered,
        target,
        weight,
        math,
        results,
        lse=None,
        log_prob=None,
        correct=None,
        entropy=None,
    ) -> None:
        args = addresses.merge_args(self.module, gathered, target, weight, math, *results)
        with _on(weight.device):
            self.module.merge(
                args,
                lse=addresses.address(lse),
                log_prob=addresses.address(log_prob),
                correct=addresses.address(correct),
                entropy=addresses.address(entropy),
                stream=_stream(weight.device),
            )

    def _chip(self, device: torch.device):
        generation, multiprocessors = self.chip_of(device)
        return self.module.Chip(generation=generation, multiprocessors=multiprocessors)


def _on(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

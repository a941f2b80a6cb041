"""The Triton kernels on NVIDIA and AMD GPUs, and in Triton's interpreter on CPU tensors."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..rowmath import RowMath
from ..targets import Targets
from ..triton_kernels import merge as merge_kernels
from ..triton_kernels import row_grad as row_grad_kernels
from ..triton_kernels import row_stats as row_stats_kernels
from ..triton_kernels import row_targets as row_targets_kernels
from ..triton_kernels.launch import INTERPRETED as _INTERPRETED
from ..triton_kernels.launch import Shape, chip_of
from ..triton_kernels.tune import choose
from .addresses import losses_like

__all__ = ["INTERPRETED", "merge", "merge_metrics", "row_grad", "row_stats", "row_targets"]

INTERPRETED: bool = _INTERPRETED.value  # decided when Triton is imported, by TRITON_INTERPRET=1


def row_targets(
    labels: Tensor,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    vocab_size: int,
) -> Targets:
    rows = Targets.empty(labels)
    _run(
        labels,
        row_targets_kernels.plan(
            chip_of(labels.device),
            labels,
            loss_mask,
            cu_seqlens,
            *rows,
            shift=shift,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
        ),
    )
    return rows


def row_stats(
    logits: Tensor, target: Tensor, weight: Tensor, math: RowMath, columns: int
) -> Tensor:
    chip = chip_of(logits.device)
    stats = weight.new_empty(weight.numel(), columns)

    def launch(shape: Shape) -> None:
        _run(
            logits,
            row_stats_kernels.plan(
                chip,
                shape,
                logits,
                target,
                weight,
                stats,
                valid=math.valid_columns(logits.shape[-1]),
                vocab_start=math.vocab_start,
                softcap=math.softcap,
                logit_scale=math.logit_scale,
            ),
        )

    name = row_stats_kernels.table_name(columns, math.softcap)
    launch(choose(chip, name, logits, launch))
    return stats


def merge(gathered: Tensor, target: Tensor, weight: Tensor, math: RowMath) -> tuple[Tensor, Tensor]:
    results = losses_like(weight)
    _merge(gathered, target, weight, math, results)
    return results


def merge_metrics(
    gathered: Tensor, target: Tensor, weight: Tensor, math: RowMath
) -> tuple[Tensor, ...]:
    loss, normalizer = losses_like(weight)
    lse, log_prob, entropy = (torch.empty_like(weight) for _ in range(3))
    correct = torch.empty_like(weight, dtype=torch.bool)
    _merge(gathered, target, weight, math, (loss, normalizer, lse, log_prob, correct, entropy))
    return loss, log_prob, lse, correct, entropy


def row_grad(
    logits: Tensor, normalizer: Tensor, target: Tensor, scale: Tensor, math: RowMath, out: Tensor
) -> None:
    chip = chip_of(logits.device)

    def launch(shape: Shape, out: Tensor = out) -> None:
        _run(
            logits,
            row_grad_kernels.plan(
                chip,
                shape,
                logits,
                normalizer,
                target,
                scale,
                out,
                valid=math.valid_columns(logits.shape[-1]),
                vocab_start=math.vocab_start,
                vocab_size=math.vocab_size,
                label_smoothing=math.label_smoothing,
                z_loss=math.z_loss,
                softcap=math.softcap,
                logit_scale=math.logit_scale,
            ),
        )

    # A search runs the kernel many times over, which logits that are their own output do not bear.
    launch(choose(chip, "row_grad", logits, lambda shape: launch(shape, torch.empty_like(logits))))


def _merge(gathered, target, weight, math: RowMath, results: tuple[Tensor, ...]) -> None:
    plan = merge_kernels.plan(
        chip_of(weight.device),
        gathered,
        target,
        weight,
        *results,
        unit=math.unit,
        vocab_size=math.vocab_size,
        label_smoothing=math.label_smoothing,
        z_loss=math.z_loss,
    )
    _run(weight, plan)


def _run(tensor: Tensor, launches) -> None:
    """Launch on the tensor's device, whichever is current, and on that device's current stream."""
    with _on(tensor.device):
        for launch in launches:
            launch.run()


def _on(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

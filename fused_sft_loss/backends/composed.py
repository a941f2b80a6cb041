"""The forward pass kernel by kernel: with collectives in it, or where no native call has it all."""

from torch import Tensor

from .. import shards
from ..rowmath import RowMath
from ..scoring import Scoring
from ..targets import Targets
from .contract import Backend, Losses, statistics_for


def loss(
    kernels: Backend, scoring: Scoring, logits: Tensor, math: RowMath, reduction: str
) -> Losses:
    """Of an unsharded vocabulary."""
    targets = scoring.found_by(kernels.row_targets, math.vocab_size)
    return loss_of_targets(kernels, targets, logits, math, reduction, group_name="")


def loss_of_targets(
    kernels: Backend,
    targets: Targets,
    logits: Tensor,
    math: RowMath,
    reduction: str,
    group_name: str,
) -> Losses:
    """Of rows that are scored on `targets`, the vocabulary being sharded over the group."""
    gathered = merged_rows(kernels, targets, logits, math, group_name, statistics_for(math))
    losses, normalizer = kernels.merge(gathered, targets.target, targets.weight, math)
    if reduction != "none":
        divisor = targets.weight_sum if reduction == "mean" else None
        losses = kernels.reduce(losses, divisor)
    return Losses.of(losses, targets, normalizer)


def merged_rows(
    kernels: Backend,
    targets: Targets,
    logits: Tensor,
    math: RowMath,
    group_name: str,
    statistics: int,
) -> Tensor:
    """Statistics of every shard, `[ranks, N, statistics]`."""
    stats = kernels.row_stats(logits, targets.target, targets.weight, math, statistics)
    return shards.gather(stats, group_name)

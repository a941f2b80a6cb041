"""The forward pass as a sequence of kernels.

It serves sharded vocabularies, whose all-gather comes between two kernels, and backends without a
single native call for the whole pass.
"""

from torch import Tensor

from .. import shards
from ..rowmath import RowMath
from ..targets import Targets
from .contract import Backend, Losses, statistics_for


def loss_of_targets(
    kernels: Backend,
    targets: Targets,
    logits: Tensor,
    math: RowMath,
    reduction: str,
    group_name: str,
) -> Losses:
    """The loss of known targets. The group shards the vocabulary; its name is "" without one."""
    gathered = gathered_statistics(kernels, targets, logits, math, group_name, statistics_for(math))
    losses, normalizer = kernels.merge(gathered, targets.target, targets.weight, math)
    if reduction != "none":
        divisor = targets.weight_sum if reduction == "mean" else None
        losses = kernels.reduce(losses, divisor)
    return Losses.of(losses, targets, normalizer)


def gathered_statistics(
    kernels: Backend,
    targets: Targets,
    logits: Tensor,
    math: RowMath,
    group_name: str,
    statistics: int,
    scale: Tensor | None = None,
) -> Tensor:
    """The statistics of all shards, `[ranks, N, statistics]`, not merged yet."""
    stats = kernels.row_stats(logits, targets.target, targets.weight, math, statistics, scale)
    return shards.gather(stats, group_name)

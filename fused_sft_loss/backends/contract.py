"""What a backend is: the row kernels, once per way of running them.

Logits are `[b, s, v]` with any row strides and a unit last stride; N = b*s rows, batch-major. No
backend may synchronise with the host on an accelerator.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..rowmath import RowMath
from ..scoring import Scoring
from ..targets import Targets

REDUCTIONS = ("mean", "sum", "none")

#: Statistics of a row, in this order: the maximum x, the sum of exp(u) with u = unit * (x -
#: maximum), the target's x (0 when another shard owns it), the sum of x, the argmax (global id),
#: the sum of u * exp(u).
STATISTICS = MAXIMUM, SUM_EXP, TARGET, SUM, ARGMAX, MOMENT = range(6)
#: How many of them a loss, a smoothed loss and metrics need.
LOSS, SMOOTHED_LOSS, METRICS = 3, 4, 6


def statistics_for(math: RowMath) -> int:
    """How many statistics the loss needs."""
    return SMOOTHED_LOSS if math.label_smoothing else LOSS


def losses_like(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Memory of the losses `[N]` and the normalizer `[N, 2]` of rows with weights `[N]`."""
    return torch.empty_like(weight), weight.new_empty(weight.numel(), 2)


class Losses(NamedTuple):
    """A loss, and what its gradient needs."""

    result: Tensor  # fp32: 0-d, or weight * loss `[N]` without a reduction
    target: Tensor  # see Targets
    weight: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    weight_sum: Tensor
    normalizer: Tensor  # `[N, 2]` fp32: maximum and sum of exponentials of each row

    @classmethod
    def of(cls, result: Tensor, targets: Targets, normalizer: Tensor) -> "Losses":
        return cls(result, *targets, normalizer)


class RowScale(NamedTuple):
    """What each row's gradient is multiplied by: weight * (grad / weight_sum), and 0 where the
    weight is 0, even if the upstream gradient is not finite."""

    grad: Tensor  # upstream, fp32: `[N]` with any stride, or 0-d for all rows
    weight: Tensor | None = None  # `[N]`; None: 1
    weight_sum: Tensor | None = None  # of a mean, where 0 counts as 1; None: 1

    def values(self) -> Tensor:
        """`[N]` fp32."""
        grad = self.grad.float()
        if self.weight_sum is not None:
            grad = grad / torch.where(self.weight_sum > 0, self.weight_sum, 1.0)
        if self.weight is None:
            return grad
        return torch.where(self.weight != 0, grad * self.weight, 0.0)


class Backend(Protocol):
    """The kernels of a loss. ``backends/eager.py`` says in plain PyTorch what each computes."""

    def row_targets(self, scoring: Scoring, vocab_size: int) -> Targets:
        """As :func:`fused_sft_loss.targets.row_targets`."""

    def row_stats(
        self, logits: Tensor, target: Tensor, weight: Tensor, math: RowMath, statistics: int
    ) -> Tensor:
        """The first `statistics` of STATISTICS, `[N, statistics]` fp32. Rows with weight 0 are
        zeros and are not read."""

    def merge(
        self, gathered: Tensor, target: Tensor, weight: Tensor, math: RowMath
    ) -> tuple[Tensor, Tensor]:
        """Losses `[N]` and normalizer of all shards' statistics `[ranks, N, statistics]`; see
        :func:`fused_sft_loss.shards.merge`."""

    def merge_metrics(
        self, gathered: Tensor, target: Tensor, weight: Tensor, math: RowMath
    ) -> tuple[Tensor, ...]:
        """See :func:`fused_sft_loss.shards.merge_metrics`."""

    def reduce(self, losses: Tensor, weight_sum: Tensor | None) -> Tensor:
        """The sum of the losses, 0-d; divided by weight_sum where that is given and not 0."""

    def loss(self, scoring: Scoring, logits: Tensor, math: RowMath, reduction: str) -> Losses:
        """All of these in turn, for an unsharded vocabulary; see :func:`.composed.loss`."""

    def row_grad(
        self,
        logits: Tensor,
        normalizer: Tensor,
        target: Tensor,
        scale: RowScale,
        math: RowMath,
        out: Tensor,
    ) -> None:
        """Write the gradient of scale * loss to `out`, which may be `logits` itself, in fp32
        rounded once. Rows with scale 0 are zeros and are not read."""


class OneReadBackend(Backend, Protocol):
    """What grad_in_forward needs besides; those of ``selection.ONE_READ`` have it."""

    def row_stats_grad(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        scale: Tensor,
        math: RowMath,
        out: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """row_stats, merge and row_grad from one read of each row, for an unsharded vocabulary;
        the losses `[N]` and the normalizer. `scale` is `[N]`."""

    def row_regrad(
        self,
        logits: Tensor,
        normalizer: Tensor,
        target: Tensor,
        scale: RowScale,
        math: RowMath,
        out: Tensor,
        stored: Tensor,
    ) -> None:
        """row_grad, which leaves rows alone whose scale is that in `stored`, bit for bit."""

    def row_rescale(self, grad: Tensor, scale: RowScale, stored: Tensor, math: RowMath) -> None:
        """Multiply the other rows of a gradient by scale / stored instead."""

"""The protocol of a backend: one function for each row kernel, and the records they return.

Logits are `[b, s, v]`. The last stride is 1, the others are free. Their N = b*s rows are numbered
batch-major. No backend may synchronise with the host on an accelerator.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..rowmath import RowMath
from ..scoring import Scoring
from ..targets import Targets, weighted_mean

REDUCTIONS = ("mean", "sum", "none")

#: Statistics of a row, in this order: the maximum x, the sum of exp(u), the target's x (0 if
#: another shard has it), the sum of x, the argmax (global id), the sum of u * exp(u). Here u is
#: unit * (x - maximum); for x and unit see RowMath.unit.
STATISTICS = MAXIMUM, SUM_EXP, TARGET, SUM, ARGMAX, MOMENT = range(6)
#: How many of them each needs: the loss, the smoothed loss, metrics.
LOSS, SMOOTHED_LOSS, METRICS = 3, 4, 6


def statistics_for(math: RowMath) -> int:
    """How many statistics the loss needs."""
    return SMOOTHED_LOSS if math.label_smoothing else LOSS


def losses_like(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised losses `[N]` and normalizer `[N, 2]`, for rows with weights `[N]`."""
    return torch.empty_like(weight), normalizer_like(weight)


def normalizer_like(weight: Tensor) -> Tensor:
    """Uninitialised, `[N, 2]`."""
    return weight.new_empty(weight.numel(), 2)


def result_like(weight: Tensor, reduction: str) -> Tensor:
    """Memory of a loss: `[N]` without a reduction, else 0-d."""
    return torch.empty_like(weight) if reduction == "none" else weight.new_empty(())


class Losses(NamedTuple):
    """A loss, and the numbers of each row that its gradient needs."""

    result: Tensor  # fp32: 0-d, or without a reduction weight * loss `[N]`
    target: Tensor  # see Targets
    weight: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    weight_sum: Tensor
    normalizer: Tensor  # `[N, 2]` fp32: maximum and sum of exponentials of each row

    @classmethod
    def of(cls, result: Tensor, targets: Targets, normalizer: Tensor) -> "Losses":
        return cls(result, *targets, normalizer)


class RowFactor(NamedTuple):
    """The factor of each row's gradient: weight * (grad / weight_sum).

    Where the weight is 0, the factor is 0, even if the upstream gradient is not finite.
    """

    grad: Tensor  # upstream, fp32: `[N]` with any stride, or 0-d for all rows
    weight: Tensor | None = None  # `[N]`; None: 1
    weight_sum: Tensor | None = None  # the divisor of a mean; 0 counts as 1. None: 1

    def values(self) -> Tensor:
        """The factors as a tensor, fp32: `[N]`, or 0-d if grad is 0-d and weight is None."""
        grad = self.grad.float()
        if self.weight_sum is not None:
            grad = weighted_mean(grad, self.weight_sum)
        if self.weight is None:
            return grad
        return torch.where(self.weight != 0, grad * self.weight, 0.0)

    def of_rows(self, rows: slice) -> "RowFactor":
        """The factors of some of the rows."""
        return RowFactor(
            self.grad[rows] if self.grad.dim() else self.grad,
            None if self.weight is None else self.weight[rows],
            self.weight_sum,
        )


class EntropyGrad(NamedTuple):
    """The upstream gradient of each row's entropy, and what its gradient needs.

    With u = z - max z, H = log(sum of exp(u)) - sum of p*u, and dH/dz = -p * (log p + H), which is
    -p * (u - sum of p*u). The sum of p*u is log(sum of exp(u)) - H.
    """

    grad: Tensor  # fp32, `[N]` with any stride; not read where RowFactor.weight is 0
    entropy: Tensor  # H, `[N]` fp32


class Backend(Protocol):
    """The kernels of a loss. ``backends/eager.py`` implements each in plain PyTorch.

    `scale`, `[N]` fp32, takes the place of math.logit_scale: one for each row. It is read only for
    scored rows. Kernels with a scale exist for METRICS only, and for no softcap, smoothing and
    z-loss; so does the gradient of an entropy. Thus the gradient has one more compiled kernel for
    each dtype, and the statistics have none.
    """

    def row_targets(self, scoring: Scoring, vocab_size: int) -> Targets:
        """See :func:`fused_sft_loss.targets.row_targets`."""

    def row_stats(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        math: RowMath,
        statistics: int,
        scale: Tensor | None = None,
    ) -> Tensor:
        """The first `statistics` of STATISTICS, `[N, statistics]` fp32. A row with weight 0 is not
        read (eager on an accelerator reads it); its statistics are 0."""

    def merge(
        self,
        gathered: Tensor,
        target: Tensor,
        weight: Tensor,
        math: RowMath,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses `[N]` and normalizer, from the statistics of all shards `[ranks, N, statistics]`;
        see :func:`fused_sft_loss.shards.merge`."""

    def merge_metrics(
        self,
        gathered: Tensor,
        target: Tensor,
        weight: Tensor,
        math: RowMath,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """See :func:`fused_sft_loss.shards.merge_metrics`."""

    def reduce(self, losses: Tensor, weight_sum: Tensor | None) -> Tensor:
        """The sum of the losses, 0-d; divided by weight_sum if that is given and not 0."""

    def row_grad(
        self,
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
        """Write the gradient of factor * loss to `out`, which may be `logits` itself.

        It is computed in fp32 and rounded once. A row with factor 0 is not read (eager on an
        accelerator reads it); its gradient is 0. With `entropy` the gradient of entropy.grad * H
        is added, and a row is not read if both factors are 0.
        """


class CompiledBackend(Backend, Protocol):
    """A backend over a compiled module: those named in ``selection.COMPILED``.

    It has the whole forward pass in one call, and the kernels of grad_in_forward.
    """

    def loss(self, scoring: Scoring, logits: Tensor, math: RowMath, reduction: str) -> Losses:
        """The whole forward pass for an unsharded vocabulary; see :mod:`.composed`."""

    def row_stats_grad(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        factor: Tensor,
        math: RowMath,
        out: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """row_stats, merge and row_grad from one read of each row, for an unsharded vocabulary.
        Returns the losses `[N]` and the normalizer. `factor` is `[N]`."""

    def row_regrad(
        self,
        logits: Tensor,
        normalizer: Tensor,
        target: Tensor,
        factor: RowFactor,
        math: RowMath,
        out: Tensor,
        stored: Tensor,
    ) -> None:
        """row_grad, but only for rows whose factor differs from `stored` in its bits."""

    def row_rescale(self, grad: Tensor, factor: RowFactor, stored: Tensor, math: RowMath) -> None:
        """Multiply the rows of a gradient whose factor differs from `stored` by factor / stored."""

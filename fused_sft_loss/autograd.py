"""The loss and its gradient as torch.library operators.

The steps are: targets -> statistics -> merge -> loss -> gradient. An operator has a schema, so
torch.compile and opcheck know the shapes of its results and which arguments it changes. Backward
keeps the logits themselves and vectors of N rows, and nothing else of the logits' size.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import agreement
from .backends import composed, selection
from .backends.contract import METRICS, Losses, RowFactor, normalizer_like, result_like
from .inplace import traced
from .operators import differentiable, first_order, operator
from .rowmath import RowMath
from .scoring import Scoring
from .targets import Targets

#: Result types in schemas: the fields of Losses, and the figures of token_metrics.
LOSSES = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
FIGURES = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


def _losses_like(scoring: Scoring, reduction: str) -> Losses:
    """Uninitialised results of :func:`loss`."""
    targets = Targets.empty(scoring.labels)
    result, normalizer = result_like(targets.weight, reduction), normalizer_like(targets.weight)
    return Losses.of(result, targets, normalizer)


def figures_like(weight: Tensor) -> tuple[Tensor, ...]:
    """Uninitialised loss, log_prob, lse, correct and entropy."""
    dtypes = (torch.float32, torch.float32, torch.float32, torch.bool, torch.float32)
    return tuple(torch.empty_like(weight, dtype=dtype) for dtype in dtypes)


def agreed_targets(
    scoring: Scoring, logits: Tensor, math: RowMath, call: str, group_name: str, backend: str
) -> Targets:
    """The targets. With a group, its ranks compare their calls; see :mod:`.agreement`."""

    def find() -> Targets:
        return scoring.found_by(selection.load(backend).row_targets, math.vocab_size)

    return agreement.agreed_targets(find, scoring, logits, math, call, group_name)


@operator(
    "row_targets(Scoring scoring, SymInt vocab_size, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda scoring, *rest: tuple(Targets.empty(scoring.labels)),
)
def row_targets(scoring: Scoring, vocab_size: int, backend: str) -> tuple[Tensor, ...]:
    """See :func:`.targets.row_targets`, and :meth:`.Scoring.found_by` for the errors."""
    return tuple(scoring.found_by(selection.load(backend).row_targets, vocab_size))


@operator(
    "loss(Tensor logits, Scoring scoring, RowMath math, str reduction, str call, str group_name, "
    f"str backend) -> {LOSSES}",
    lambda logits, scoring, math, reduction, *rest: tuple(_losses_like(scoring, reduction)),
)
def loss(
    logits: Tensor,
    scoring: Scoring,
    math: RowMath,
    reduction: str,
    call: str,
    group_name: str,
    backend: str,
) -> tuple[Tensor, ...]:
    """The fields of :class:`.Losses`."""
    math, kernels = math.read(), selection.load(backend)
    if not group_name and backend in selection.COMPILED and not scoring.per_sample:
        return tuple(kernels.loss(scoring, logits, math, reduction))
    targets = agreed_targets(scoring, logits, math, call, group_name, backend)
    return tuple(composed.loss_of_targets(kernels, targets, logits, math, reduction, group_name))


@operator(
    "loss_and_metrics(Tensor logits, Scoring scoring, RowMath math, str reduction, str call, "
    f"str group_name, str backend) -> {LOSSES[:-1]}, {FIGURES[1:]}",
    lambda logits, scoring, math, reduction, *rest: (
        *(like := _losses_like(scoring, reduction)),
        *figures_like(like.weight),
    ),
)
def loss_and_metrics(
    logits: Tensor,
    scoring: Scoring,
    math: RowMath,
    reduction: str,
    call: str,
    group_name: str,
    backend: str,
) -> tuple[Tensor, ...]:
    """The fields of :class:`.Losses`, then the figures of `token_metrics`, from one read.

    The losses are `[N]`: `reduction` must be "none".
    """
    math, kernels = math.read(), selection.load(backend)
    targets = agreed_targets(scoring, logits, math, call, group_name, backend)
    gathered = composed.gathered_statistics(kernels, targets, logits, math, group_name, METRICS)
    rows = gathered, targets.target, targets.weight, math
    losses, normalizer = kernels.merge(*rows)
    return *Losses.of(losses, targets, normalizer), *kernels.merge_metrics(*rows)


@operator(
    "token_metrics(Tensor logits, Scoring scoring, RowMath math, str call, str group_name, "
    f"str backend) -> {FIGURES}",
    lambda logits, scoring, *rest: figures_like(Targets.empty(scoring.labels).weight),
)
def token_metrics(
    logits: Tensor, scoring: Scoring, math: RowMath, call: str, group_name: str, backend: str
) -> tuple[Tensor, ...]:
    """(loss, log_prob, lse, correct, entropy), `[N]` each, from one read of the scored rows."""
    math, kernels = math.read(), selection.load(backend)
    targets = agreed_targets(scoring, logits, math, call, group_name, backend)
    gathered = composed.gathered_statistics(kernels, targets, logits, math, group_name, METRICS)
    return kernels.merge_metrics(gathered, targets.target, targets.weight, math)


_GRADIENT = (
    "Tensor grad, Tensor target, Tensor weight, Tensor? weight_sum, Tensor normalizer, "
    "RowMath math, str backend"
)


@operator(
    f"row_grad(Tensor logits, {_GRADIENT}) -> Tensor",
    lambda logits, *rest: torch.empty_like(logits),
)
def row_grad(logits: Tensor, *rest: Any) -> Tensor:
    """Gradient of the logits, in their dtype.

    `grad` is the upstream gradient: of each loss `[N]`, of their sum (0-d), or with weight_sum of
    their mean (0-d).
    """
    out = torch.empty_like(logits)
    _write_grad(logits, *rest, out=out)
    return out


@operator(f"row_grad_(Tensor(a!) logits, {_GRADIENT}) -> ()", lambda *args: None, changes=0)
def row_grad_(logits: Tensor, *rest: Any) -> None:
    """:func:`row_grad`, written over the logits."""
    _write_grad(logits, *rest, out=logits)


def _write_grad(
    logits: Tensor,
    grad: Tensor,
    target: Tensor,
    weight: Tensor,
    weight_sum: Tensor | None,
    normalizer: Tensor,
    math: RowMath,
    backend: str,
    *,
    out: Tensor,
) -> None:
    factor = RowFactor(grad, weight, weight_sum)
    selection.load(backend).row_grad(logits, normalizer, target, factor, math.read(), out)


class _Differentiable(torch.autograd.Function):
    """An operator whose first result is differentiable in the logits, and no other result."""

    operator: ClassVar[Callable]

    @classmethod
    def forward(cls, *inputs: Any) -> tuple[Tensor, ...]:
        return cls.operator(*inputs[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        logits, _scoring, ctx.math, reduction, _call, _group_name, ctx.backend, ctx.inplace = inputs
        result, *figures = output
        target, weight, _count, weight_sum, normalizer = figures[:5]
        divisor = weight_sum if reduction == "mean" else None
        ctx.save_for_backward(logits, target, weight, divisor, normalizer)
        ctx.mark_non_differentiable(*figures)
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_result: Tensor, *_grads_of_figures: None
    ) -> tuple[Tensor | None, ...]:
        logits, *rest = ctx.saved_tensors
        args = (logits, grad_result, *rest, ctx.math, ctx.backend)
        if ctx.inplace and not traced(logits):
            row_grad_(*args)
            grad_logits = logits.detach()
        else:
            grad_logits = row_grad(*args)
        return grad_logits, *[None] * 7


class Loss(_Differentiable):
    """:func:`loss`, differentiable in the logits."""

    operator = staticmethod(loss)


class LossAndMetrics(_Differentiable):
    """:func:`loss_and_metrics`; its losses are differentiable in the logits."""

    operator = staticmethod(loss_and_metrics)


_DIFFERENTIABLE = (
    "(Tensor logits, Scoring scoring, RowMath math, str reduction, str call, str group_name, "
    "str backend, bool inplace_backward)"
)
differentiable_loss = differentiable(f"differentiable_loss{_DIFFERENTIABLE} -> {LOSSES}", Loss)
differentiable_loss_and_metrics = differentiable(
    f"differentiable_loss_and_metrics{_DIFFERENTIABLE} -> {LOSSES[:-1]}, {FIGURES[1:]}",
    LossAndMetrics,
)

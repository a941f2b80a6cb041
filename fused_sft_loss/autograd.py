"""The schedule as torch.library operators: targets -> statistics -> merge -> loss -> gradient.

Operators, so that torch.compile and opcheck see schemas, shapes and what is mutated. Saved for
backward: the logits themselves and vectors of N rows; nothing else of the logits' size.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import agreement
from .backends import composed, selection
from .backends.contract import METRICS, Losses, RowScale, losses_like
from .inplace import traced
from .operators import differentiable, first_order, operator
from .rowmath import RowMath
from .scoring import Scoring
from .targets import Targets

#: Results in schemas: of Losses, and of token_metrics.
LOSSES = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
FIGURES = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


def _losses_like(scoring: Scoring, reduction: str) -> Losses:
    """Without data."""
    targets = Targets.empty(scoring.labels)
    losses, normalizer = losses_like(targets.weight)
    result = losses if reduction == "none" else losses.new_empty(())
    return Losses.of(result, targets, normalizer)


def _figures_like(weight: Tensor) -> tuple[Tensor, ...]:
    """loss, log_prob, lse, correct and entropy, without data."""
    dtypes = (torch.float32, torch.float32, torch.float32, torch.bool, torch.float32)
    return tuple(torch.empty_like(weight, dtype=dtype) for dtype in dtypes)


def _targets(
    scoring: Scoring, logits: Tensor, math: RowMath, call: str, group_name: str, backend: str
) -> Targets:
    """Of a call on which all ranks of the group agree."""

    def find() -> Targets:
        return scoring.found_by(selection.load(backend).row_targets, math.vocab_size)

    if not group_name:
        return find()
    return agreement.agreed_targets(find, scoring, logits, math, call, group_name)


@operator(
    "row_targets(Scoring scoring, SymInt vocab_size, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda scoring, *rest: tuple(Targets.empty(scoring.labels)),
)
def row_targets(scoring: Scoring, vocab_size: int, backend: str) -> tuple[Tensor, ...]:
    """See :func:`.targets.row_targets`; raises ValueError for values that cannot be right."""
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
    if not group_name:
        return tuple(kernels.loss(scoring, logits, math, reduction))
    targets = _targets(scoring, logits, math, call, group_name, backend)
    return tuple(composed.loss_of_targets(kernels, targets, logits, math, reduction, group_name))


@operator(
    "loss_and_metrics(Tensor logits, Scoring scoring, RowMath math, str reduction, str call, "
    f"str group_name, str backend) -> {LOSSES[:-1]}, {FIGURES[1:]}",
    lambda logits, scoring, math, reduction, *rest: (
        *(like := _losses_like(scoring, reduction)),
        *_figures_like(like.weight),
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
    """The fields of :class:`.Losses`, `[N]` losses, then all of `token_metrics`; of one read."""
    math, kernels = math.read(), selection.load(backend)
    targets = _targets(scoring, logits, math, call, group_name, backend)
    gathered = composed.merged_rows(kernels, targets, logits, math, group_name, METRICS)
    rows = gathered, targets.target, targets.weight, math
    losses, normalizer = kernels.merge(*rows)
    return *Losses.of(losses, targets, normalizer), *kernels.merge_metrics(*rows)


@operator(
    "token_metrics(Tensor logits, Scoring scoring, RowMath math, str call, str group_name, "
    f"str backend) -> {FIGURES}",
    lambda logits, scoring, *rest: _figures_like(Targets.empty(scoring.labels).weight),
)
def token_metrics(
    logits: Tensor, scoring: Scoring, math: RowMath, call: str, group_name: str, backend: str
) -> tuple[Tensor, ...]:
    """(loss, log_prob, lse, correct, entropy), `[N]` each, of one read of the scored rows."""
    math, kernels = math.read(), selection.load(backend)
    targets = _targets(scoring, logits, math, call, group_name, backend)
    gathered = composed.merged_rows(kernels, targets, logits, math, group_name, METRICS)
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
    """Gradient of the logits, in their dtype. `grad` is that of each loss `[N]`, or of their sum
    or, with weight_sum, their mean."""
    out = torch.empty_like(logits)
    _write_grad(logits, *rest, out=out)
    return out


@operator(f"row_grad_(Tensor(a!) logits, {_GRADIENT}) -> ()", lambda *args: None, changes=0)
def row_grad_(logits: Tensor, *rest: Any) -> None:
    """:func:`row_grad` over the logits themselves."""
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
    scale = RowScale(grad, weight, weight_sum)
    selection.load(backend).row_grad(logits, normalizer, target, scale, math.read(), out)


class _Differentiable(torch.autograd.Function):
    """The first result of an operator has a gradient in the logits, all others are figures."""

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
    """:func:`loss_and_metrics`, its losses differentiable in the logits."""

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

"""The loss of an output layer and its gradients, as operators and an autograd.Function."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import autograd, groups
from ..backends import selection
from ..backends.contract import METRICS, RowFactor, normalizer_like, result_like, statistics_for
from ..operators import differentiable, first_order, operator
from ..rowmath import RowMath
from ..scoring import Scoring
from ..targets import Targets
from . import main_grad, products, two_passes
from .gradients import Gradients
from .head import Head
from .rows import ScoredRows


class Inputs(NamedTuple):
    """The tensors of a call: an output layer, and the R rows that go through it."""

    hidden: Tensor  # [M, h]
    weight: Tensor  # [V_local, h]
    bias: Tensor | None
    positions: Tensor  # [R], in hidden
    target: Tensor  # [R]
    row_weight: Tensor  # [R]
    weight_sum: Tensor  # 0-d

    @property
    def head(self) -> Head:
        bias = None if self.bias is None else self.bias.detach()
        hidden, weight = self.hidden.detach(), self.weight.detach()
        return Head(hidden, self.positions, weight, bias, self.row_weight)

    @property
    def rows(self) -> ScoredRows:
        return ScoredRows(self.positions, self.target, self.row_weight, None)


INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor positions, Tensor target, "
    "Tensor row_weight, Tensor weight_sum"
)
_OPTIONS = "RowMath math, SymInt size, str reduction, str group_name, str backend"
COUNT = len(Inputs._fields)
_FIGURES = autograd.FIGURES[1:]


def _loss_like(*args: Any) -> tuple[Tensor, Tensor]:
    """Uninitialised results of :func:`loss`."""
    row_weight, reduction = Inputs(*args[:COUNT]).row_weight, args[COUNT + 2]
    return result_like(row_weight, reduction), normalizer_like(row_weight)


@operator(
    "linear_targets(Scoring scoring, Tensor hidden, RowMath math, SymInt columns, str call, "
    "str group_name, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda scoring, *rest: tuple(Targets.empty(scoring.labels)),
)
def targets(
    scoring: Scoring,
    hidden: Tensor,
    math: RowMath,
    columns: int,
    call: str,
    group_name: str,
    backend: str,
) -> tuple[Tensor, ...]:
    """The targets of all rows. The ranks of a group compare their calls first."""
    logits = hidden.new_empty(0, columns)
    return tuple(autograd.agreed_targets(scoring, logits, math, call, group_name, backend))


@operator(f"linear_loss({INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)", _loss_like)
def loss(*args: Any) -> tuple[Tensor, ...]:
    """The loss, 0-d or `[R]`, and the normalizer of the rows."""
    return _losses(Inputs(*args[:COUNT]), *args[COUNT:], metrics=False)


@operator(
    f"linear_loss_and_metrics({INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, {_FIGURES}",
    lambda *args: (*_loss_like(*args), *autograd.figures_like(args[5])),
)
def loss_and_metrics(*args: Any) -> tuple[Tensor, ...]:
    """:func:`loss`, and the figures of `token_metrics` for the rows."""
    return _losses(Inputs(*args[:COUNT]), *args[COUNT:], metrics=True)


def _losses(
    inputs: Inputs,
    math: RowMath,
    size: int,
    reduction: str,
    group_name: str,
    backend: str,
    *,
    metrics: bool,
) -> tuple[Tensor, ...]:
    math, kernels, rows = math.read(), selection.load(backend), inputs.rows
    statistics = METRICS if metrics else statistics_for(math)
    with products.without_autocast(inputs.hidden):
        gathered = two_passes.gathered_statistics(
            kernels, inputs.head, rows, math, size, group_name, statistics
        )
    merging = gathered, rows.target, rows.weight, math
    result, normalizer = kernels.merge(*merging)
    if reduction != "none":
        result = kernels.reduce(result, inputs.weight_sum if reduction == "mean" else None)
    figures = kernels.merge_metrics(*merging) if metrics else ()
    return result, normalizer, *figures


@operator(
    f"linear_grad({INPUTS}, Tensor grad, Tensor normalizer, RowMath math, SymInt size, "
    "str reduction, bool[] wanted, str reduce_name, str backend) -> (Tensor, Tensor, Tensor)",
    lambda *args: _new_gradients(Inputs(*args[:COUNT]), args[COUNT + 5]),
)
def gradients(*args: Any) -> tuple[Tensor, ...]:
    """The gradients of hidden, weight and bias; an empty tensor where one is not `wanted`."""
    inputs, wanted = Inputs(*args[:COUNT]), args[COUNT + 5]
    found = _new_gradients(inputs, wanted)
    hidden, weight, bias = (g if want else None for g, want in zip(found, wanted, strict=True))
    _write_gradients(inputs, *args[COUNT:], into=Gradients(hidden, weight, bias))
    return found


def _new_gradients(inputs: Inputs, wanted: list[bool]) -> tuple[Tensor, ...]:
    """Memory for the gradients that are wanted. Unscored rows of `hidden` have gradient 0."""
    hidden, weight, bias = inputs[:3]
    make = (torch.zeros_like, torch.empty_like, torch.empty_like)
    like = (hidden, weight, weight if bias is None else bias)
    return tuple(
        new(tensor) if want else tensor.new_empty(0)
        for new, tensor, want in zip(make, like, wanted, strict=True)
    )


def _write_gradients(
    inputs: Inputs,
    grad: Tensor,
    normalizer: Tensor,
    math: RowMath,
    size: int,
    reduction: str,
    wanted: list[bool],
    reduce_name: str,
    backend: str,
    *,
    into: Gradients,
) -> None:
    """Write the gradients for the upstream gradient `grad`, 0-d or `[R]`."""
    divisor = inputs.weight_sum if reduction == "mean" else None
    with products.without_autocast(inputs.hidden):
        two_passes.gradients(
            selection.load(backend),
            inputs.head,
            inputs.rows,
            normalizer,
            RowFactor(grad, inputs.row_weight, divisor),
            math.read(),
            size,
            into,
            groups.by_name(reduce_name) if reduce_name else None,
        )


class _Differentiable(torch.autograd.Function):
    """An operator whose first result is differentiable in hidden, weight and bias.

    Its last two inputs are reduce_name, the group that sums the gradient of hidden ("" for none),
    and whether the gradient of weight goes into its main_grad.
    """

    operator: ClassVar[Callable]

    @classmethod
    def forward(cls, *inputs: Any) -> tuple[Tensor, ...]:
        return cls.operator(*inputs[:-2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        _result, normalizer, *figures = output
        math, size, reduction, _group_name, backend, reduce_name, fused = inputs[COUNT:]
        ctx.save_for_backward(*inputs[:COUNT], normalizer)
        ctx.before, ctx.after = (math, size, reduction), (reduce_name, backend)
        ctx.fused = main_grad.kept(inputs[1], fused)
        ctx.mark_non_differentiable(normalizer, *figures)
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, *_grads_of_figures: None) -> tuple[Tensor | None, ...]:
        *saved, normalizer = ctx.saved_tensors
        inputs, wanted = Inputs(*saved), list(ctx.needs_input_grad[:3])
        rest = (grad, normalizer, *ctx.before, wanted, *ctx.after)
        if ctx.fused is not None and wanted[1]:
            found = _into_main_grad(ctx.fused, inputs, *rest)
        else:
            found = gradients(*inputs, *rest)
        needed = (grad if want else None for grad, want in zip(found, wanted, strict=True))
        return *needed, *[None] * (COUNT + 4)


def _into_main_grad(weight: Tensor, inputs: Inputs, *rest: Any) -> tuple[Tensor | None, ...]:
    """:func:`gradients`, with that of weight in its main_grad."""
    kept = main_grad.of(weight)
    wants_hidden, _, wants_bias = rest[5]
    hidden, _, bias = _new_gradients(inputs, [wants_hidden, False, wants_bias])
    into = Gradients(
        hidden if wants_hidden else None,
        kept.memory,
        bias if wants_bias else None,
        add=kept.add,
    )
    _write_gradients(inputs, *rest, into=into)
    return hidden, main_grad.reported(weight), bias


class Loss(_Differentiable):
    """:func:`loss`, differentiable."""

    operator = staticmethod(loss)


class LossAndMetrics(_Differentiable):
    """:func:`loss_and_metrics`; its loss is differentiable."""

    operator = staticmethod(loss_and_metrics)


_MORE = f"({INPUTS}, {_OPTIONS}, str reduce_name, bool into_main_grad)"
differentiable_loss = differentiable(f"differentiable_linear_loss{_MORE} -> (Tensor, Tensor)", Loss)
differentiable_loss_and_metrics = differentiable(
    f"differentiable_linear_loss_and_metrics{_MORE} -> (Tensor, Tensor, {_FIGURES}", LossAndMetrics
)

"""The schedule as torch.library operators: targets -> statistics -> merge -> loss -> gradient.

Operators, so that torch.compile and opcheck see schemas, shapes and what is mutated. Saved for
backward: the logits themselves and vectors of N rows; nothing else of the logits' size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import flags, rowmath, shards, targets
from .backends import choose
from .backends.addresses import losses_like
from .inplace import traced
from .operators import differentiable, first_order, operator
from .rowmath import RowMath

_MATH = rowmath.SCHEMA
_MATH_FIELDS = len(RowMath._fields)


def may_synchronise(tensor: Tensor) -> bool:
    """Whether values may be looked at: free on a CPU, elsewhere a synchronisation on request."""
    return flags.enabled(flags.CHECK) or tensor.device.type == "cpu"


@operator(
    "row_targets(Tensor labels, Tensor? loss_mask, Tensor? cu_seqlens, bool shift, "
    "int ignore_index, SymInt vocab_size, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda labels, *rest: tuple(targets.Targets.empty(labels)),
)
def row_targets(labels, loss_mask, cu_seqlens, shift, ignore_index, vocab_size, backend):
    """See :func:`.targets.row_targets`; raises ValueError for values that cannot be right."""
    checked = may_synchronise(labels)
    if checked:
        targets.check_values(loss_mask, cu_seqlens, labels.numel())
    kernel = choose.load(backend).row_targets
    given = targets.readable(labels, loss_mask, cu_seqlens)
    result = kernel(*given, shift, ignore_index, vocab_size)
    if checked:
        targets.check_labels(result.target, labels, shift, vocab_size)
    return tuple(result)


def merged_rows(logits, target, weight, math: RowMath, group_name: str, backend: str, columns: int):
    """Statistics of every shard, `[ranks, N, columns]`."""
    stats = choose.load(backend).row_stats(logits, target, weight, math, columns)
    return shards.gather(stats, group_name)


@operator(
    f"row_losses(Tensor logits, Tensor target, Tensor weight, {_MATH}, str group_name, "
    "str backend) -> (Tensor, Tensor)",
    lambda logits, target, weight, *rest: losses_like(weight),
)
def row_losses(logits, target, weight, *rest):
    """(weight * loss `[N]`, normalizer `[N, 2]`), fp32, of logits `[b, s, v]`."""
    math, (group_name, backend) = RowMath.of_arguments(*rest[:_MATH_FIELDS]), rest[_MATH_FIELDS:]
    columns = 4 if math.label_smoothing else 3
    gathered = merged_rows(logits, target, weight, math, group_name, backend, columns)
    return choose.load(backend).merge(gathered, target, weight, math)


@operator(
    "row_losses_and_metrics(Tensor logits, Tensor target, Tensor weight, "
    f"{_MATH}, str group_name, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda logits, target, weight, *rest: (
        *losses_like(weight),
        *vectors_like(weight, 5, truths=(3,)),
    ),
)
def row_losses_and_metrics(logits, target, weight, *rest):
    """(losses, normalizer) of `row_losses`, then all of `token_metrics`, of one read."""
    math, (group_name, backend) = RowMath.of_arguments(*rest[:_MATH_FIELDS]), rest[_MATH_FIELDS:]
    gathered = merged_rows(logits, target, weight, math, group_name, backend, 6)
    kernels = choose.load(backend)
    losses, normalizer = kernels.merge(gathered, target, weight, math)
    return losses, normalizer, *kernels.merge_metrics(gathered, target, weight, math)


@operator(
    f"token_metrics(Tensor logits, Tensor target, Tensor weight, {_MATH}, str group_name, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda logits, target, weight, *rest: vectors_like(weight, 5, truths=(3,)),
)
def token_metrics(logits, target, weight, *rest):
    """(loss, log_prob, lse, correct, entropy), `[N]` each, of one read of the scored rows."""
    math, (group_name, backend) = RowMath.of_arguments(*rest[:_MATH_FIELDS]), rest[_MATH_FIELDS:]
    gathered = merged_rows(logits, target, weight, math, group_name, backend, 6)
    return choose.load(backend).merge_metrics(gathered, target, weight, math)


@operator(
    "row_grad(Tensor grad, Tensor logits, Tensor target, Tensor weight, Tensor normalizer, "
    f"{_MATH}, str backend) -> Tensor",
    lambda grad, logits, *rest: torch.empty_like(logits),
)
def row_grad(grad, logits, target, weight, normalizer, *rest):
    """Gradient of the logits, in their dtype, for the gradient `[N]` of the token losses."""
    out = torch.empty_like(logits)
    _write_grad(grad, logits, target, weight, normalizer, rest, out)
    return out


@operator(
    "row_grad_(Tensor grad, Tensor(a!) logits, Tensor target, Tensor weight, Tensor normalizer, "
    f"{_MATH}, str backend) -> ()",
    lambda *args: None,
    changes=1,
)
def row_grad_(grad, logits, target, weight, normalizer, *rest):
    """:func:`row_grad` over the logits themselves."""
    _write_grad(grad, logits, target, weight, normalizer, rest, logits)


def _write_grad(grad, logits, target, weight, normalizer, rest, out):
    math, backend = RowMath.of_arguments(*rest[:-1]), rest[-1]
    choose.load(backend).row_grad(logits, normalizer, target, rows_scale(grad, weight), math, out)


def rows_scale(grad: Tensor, weight: Tensor) -> Tensor:
    """Upstream gradient times weight `[N]`, in fp32: before anything is rounded.

    A row with weight 0 stays out even when the upstream gradient is not finite.
    """
    return torch.where(weight != 0, grad.float() * weight, 0.0)


def vectors_like(weight: Tensor, count: int, truths: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
    """`count` results `[N]` without data, fp32, those at `truths` bool."""
    dtypes = (torch.bool if at in truths else torch.float32 for at in range(count))
    return tuple(torch.empty_like(weight, dtype=dtype) for dtype in dtypes)


class _Differentiable(torch.autograd.Function):
    """The first result of an operator has a gradient in the logits, all others are figures."""

    operator: Callable

    @classmethod
    def forward(cls, logits, target, weight, *rest):
        return cls.operator(logits, target, weight, *rest[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        (logits, target, weight, *rest), (_losses, normalizer, *figures) = inputs, output
        *rest, ctx.inplace = rest
        ctx.save_for_backward(logits, target, weight, normalizer)
        ctx.rest = (*rest[:_MATH_FIELDS], rest[-1])
        ctx.mark_non_differentiable(normalizer, *figures)

    @staticmethod
    @first_order
    def backward(ctx, grad_losses, *_grads_of_figures):
        logits, target, weight, normalizer = ctx.saved_tensors
        args = (grad_losses, logits, target, weight, normalizer, *ctx.rest)
        if ctx.inplace and not traced(logits):
            row_grad_(*args)
            grad_logits = logits.detach()
        else:
            grad_logits = row_grad(*args)
        return (grad_logits, *[None] * (2 + _MATH_FIELDS + 3))


class TokenLosses(_Differentiable):
    """:func:`row_losses`, differentiable in the logits."""

    operator = staticmethod(row_losses)


class TokenLossesAndMetrics(_Differentiable):
    """:func:`row_losses_and_metrics`, its losses differentiable in the logits."""

    operator = staticmethod(row_losses_and_metrics)


token_losses = differentiable(
    f"token_losses(Tensor logits, Tensor target, Tensor weight, {_MATH}, str group_name, "
    "str backend, bool inplace_backward) -> (Tensor, Tensor)",
    TokenLosses,
)
token_losses_and_metrics = differentiable(
    "token_losses_and_metrics(Tensor logits, Tensor target, Tensor weight, "
    f"{_MATH}, str group_name, str backend, bool inplace_backward) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    TokenLossesAndMetrics,
)

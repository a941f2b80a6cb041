"""The schedule of grad_in_forward as torch.library operators: loss and gradient from one read.

Forward knows the gradient that backward will be given (`expected`), so it leaves each row only once
its gradient is written: over the logits, or to a buffer. Backward compares, row by row and on the
device, and does again what was stored for another scale: from the logits, which a buffer leaves as
they were, exactly; over the logits by the ratio, which rounds a second time.
"""

import torch
from torch import Tensor

from . import rowmath
from .autograd import rows_scale
from .backends import choose
from .rowmath import RowMath

_MATH = rowmath.SCHEMA


def token_losses(logits: Tensor, target: Tensor, weight: Tensor, *rest) -> Tensor:
    """weight * loss `[N]`, fp32, differentiable in the logits `[b, s, v]`, once.

    Args: those of the operator of this name in autograd.py, and before the last one, whether in
    place, the 0-d gradient that each of the results will be given. In place the logits hold their
    own gradient from here on.
    """
    *math, group_name, backend, expected, inplace = rest
    stored = rows_scale(expected, weight)
    call = (logits.detach(), target, weight, stored, *math, backend)
    if inplace:
        if not torch.compiler.is_compiling():  # which has no views to lose track of
            logits = _SameMemory.apply(logits)
        losses, lse = torch.ops.fused_sft_loss.row_stats_grad_(*call)
        grad = None
    else:
        losses, lse, grad = torch.ops.fused_sft_loss.row_stats_grad(*call)
    return torch.ops.fused_sft_loss.with_grad(
        logits, losses, grad, target, weight, lse, stored, *math, backend
    )


class _SameMemory(torch.autograd.Function):
    """A tensor by another name, and not as a view.

    Of a view that is written to autograd makes a new place in the graph, whose gradient is a copy
    as large as the view's base. This place was taken before.
    """

    @staticmethod
    def forward(ctx, logits):
        return logits.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


@torch.library.custom_op(
    "fused_sft_loss::row_stats_grad",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor target, Tensor weight, Tensor scale, {_MATH}, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)
def row_stats_grad(logits, target, weight, scale, *rest):
    """(weight * loss `[N]`, lse `[N]`, the gradient of scale * loss in the logits' dtype)."""
    out = torch.empty_like(logits)
    return (*_write(logits, target, weight, scale, rest, out), out)


@row_stats_grad.register_fake
def _(logits, target, weight, scale, *rest):
    return torch.empty_like(weight), torch.empty_like(weight), torch.empty_like(logits)


@torch.library.custom_op(
    "fused_sft_loss::row_stats_grad_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, Tensor target, Tensor weight, Tensor scale, {_MATH}, "
    "str backend) -> (Tensor, Tensor)",
)
def row_stats_grad_(logits, target, weight, scale, *rest):
    """:func:`row_stats_grad` over the logits themselves."""
    return _write(logits, target, weight, scale, rest, logits)


@row_stats_grad_.register_fake
def _(logits, target, weight, scale, *rest):
    return torch.empty_like(weight), torch.empty_like(weight)


def _write(logits, target, weight, scale, rest, out):
    math, backend = RowMath(*rest[:-1]), rest[-1]
    return choose.load(backend).row_stats_grad(logits, target, weight, scale, math, out)


@torch.library.custom_op(
    "fused_sft_loss::with_grad",
    mutates_args=(),
    schema="(Tensor logits, Tensor losses, Tensor? grad, Tensor target, Tensor weight, Tensor lse, "
    f"Tensor stored, {_MATH}, str backend) -> Tensor",
)
def with_grad(logits, losses, grad, target, weight, lse, stored, *rest):
    """The losses `[N]`, whose gradient in the logits is `grad`, or where that is None lies in their
    memory; both for the scale `stored` `[N]`."""
    return losses.clone()


@with_grad.register_fake
def _(logits, losses, grad, target, weight, lse, stored, *rest):
    return torch.empty_like(losses)


def _save(ctx, inputs, output):
    logits, _, grad, target, weight, lse, stored, *rest = inputs
    ctx.save_for_backward(logits, grad, target, weight, lse, stored)
    ctx.rest = rest


def _backward(ctx, grad_losses):
    logits, grad, target, weight, lse, stored = ctx.saved_tensors
    scale = rows_scale(grad_losses, weight)
    if grad is None:
        torch.ops.fused_sft_loss.row_rescale_(logits, scale, stored, *ctx.rest)
        grad = logits.detach()
    else:
        torch.ops.fused_sft_loss.row_regrad_(grad, logits, target, lse, scale, stored, *ctx.rest)
    return (grad, *[None] * (6 + len(ctx.rest)))


torch.library.register_autograd("fused_sft_loss::with_grad", _backward, setup_context=_save)


@torch.library.custom_op(
    "fused_sft_loss::row_regrad_",
    mutates_args=("grad",),
    schema="(Tensor(a!) grad, Tensor logits, Tensor target, Tensor lse, Tensor scale, "
    f"Tensor stored, {_MATH}, str backend) -> ()",
)
def row_regrad_(grad, logits, target, lse, scale, stored, *rest):
    """The gradient of scale * loss in those rows of `grad` that hold it for another scale."""
    math, backend = RowMath(*rest[:-1]), rest[-1]
    choose.load(backend).row_grad(logits, lse, target, scale, math, grad, stored)


@torch.library.custom_op(
    "fused_sft_loss::row_rescale_",
    mutates_args=("grad",),
    schema=f"(Tensor(a!) grad, Tensor scale, Tensor stored, {_MATH}, str backend) -> ()",
)
def row_rescale_(grad, scale, stored, *rest):
    """:func:`row_regrad_` where the logits are gone: such rows times scale / stored."""
    math, backend = RowMath(*rest[:-1]), rest[-1]
    choose.load(backend).row_rescale(grad, scale, stored, math)

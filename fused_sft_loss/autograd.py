"""The schedule as torch.library operators: targets -> statistics -> merge -> loss -> gradient.

Operators rather than an autograd.Function, so that torch.compile and opcheck see schemas, shapes
and what is mutated. Saved for backward: the logits themselves and vectors of N rows; nothing else
of the logits' size.
"""

import os

import torch
from torch import Tensor

from . import rowmath, shards, targets
from .backends import choose
from .rowmath import RowMath

CHECK_VARIABLE = "FUSED_SFT_LOSS_CHECK"

_MATH = rowmath.SCHEMA
_MATH_FIELDS = len(RowMath.__dataclass_fields__)


def may_synchronise(tensor: Tensor) -> bool:
    """Whether values may be looked at: free on a CPU, elsewhere a synchronisation on request."""
    return tensor.device.type == "cpu" or os.environ.get(CHECK_VARIABLE, "0") not in ("", "0")


@torch.library.custom_op(
    "fused_sft_loss::row_targets",
    mutates_args=(),
    schema="(Tensor labels, Tensor? loss_mask, Tensor? cu_seqlens, bool shift, int ignore_index, "
    "SymInt vocab_size, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def row_targets(labels, loss_mask, cu_seqlens, shift, ignore_index, vocab_size, backend):
    """See :func:`.targets.row_targets`; raises ValueError for values that cannot be right."""
    checked = may_synchronise(labels)
    if checked:
        targets.check_values(loss_mask, cu_seqlens, labels.numel())
    kernel = choose.load(backend).row_targets
    result = kernel(labels, loss_mask, cu_seqlens, shift, ignore_index, vocab_size)
    if checked:
        targets.check_labels(result.target, labels, shift, vocab_size)
    return tuple(result)


@row_targets.register_fake
def _(labels, loss_mask, cu_seqlens, shift, ignore_index, vocab_size, backend):
    return tuple(targets.Targets.empty(labels))


def merged_rows(logits, target, weight, math: RowMath, group_name: str, backend: str, columns: int):
    """Statistics of every shard, `[ranks, N, columns]`."""
    stats = choose.load(backend).row_stats(logits, target, weight, math, columns)
    return shards.gather(stats, math, logits.shape[-1], group_name, check=may_synchronise(logits))


@torch.library.custom_op(
    "fused_sft_loss::token_losses",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor target, Tensor weight, {_MATH}, str group_name, str backend, "
    "bool inplace_backward) -> (Tensor, Tensor)",
)
def token_losses(logits, target, weight, *rest):
    """(weight * loss `[N]`, lse `[N]`), fp32, of logits `[b, s, v]`, differentiable in them."""
    math, (group_name, backend, _) = RowMath(*rest[:_MATH_FIELDS]), rest[_MATH_FIELDS:]
    columns = 4 if math.label_smoothing else 3
    gathered = merged_rows(logits, target, weight, math, group_name, backend, columns)
    return choose.load(backend).merge(gathered, target, weight, math)


@token_losses.register_fake
def _(logits, target, weight, *rest):
    return torch.empty_like(weight), torch.empty_like(weight)


@torch.library.custom_op(
    "fused_sft_loss::row_grad",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor logits, Tensor target, Tensor weight, Tensor lse, {_MATH}, "
    "str backend) -> Tensor",
)
def row_grad(grad, logits, target, weight, lse, *rest):
    """Gradient of the logits, in their dtype, for the gradient `[N]` of the token losses."""
    out = torch.empty_like(logits)
    _write_grad(grad, logits, target, weight, lse, rest, out)
    return out


@row_grad.register_fake
def _(grad, logits, target, weight, lse, *rest):
    return torch.empty_like(logits)


@torch.library.custom_op(
    "fused_sft_loss::row_grad_",
    mutates_args=("logits",),
    schema=f"(Tensor grad, Tensor(a!) logits, Tensor target, Tensor weight, Tensor lse, {_MATH}, "
    "str backend) -> ()",
)
def row_grad_(grad, logits, target, weight, lse, *rest):
    """:func:`row_grad` over the logits themselves."""
    _write_grad(grad, logits, target, weight, lse, rest, logits)


def _write_grad(grad, logits, target, weight, lse, rest, out):
    math, backend = RowMath(*rest[:-1]), rest[-1]
    choose.load(backend).row_grad(logits, lse, target, rows_scale(grad, weight), math, out)


def rows_scale(grad: Tensor, weight: Tensor) -> Tensor:
    """Upstream gradient times weight `[N]`, in fp32: before anything is rounded.

    A row with weight 0 stays out even when the upstream gradient is not finite.
    """
    return torch.where(weight != 0, grad.float() * weight, 0.0)


def _save(ctx, inputs, output):
    logits, target, weight, *rest = inputs
    ctx.save_for_backward(logits, target, weight, output[1])
    ctx.math, (_, ctx.backend, ctx.inplace) = rest[:_MATH_FIELDS], rest[_MATH_FIELDS:]


def _backward(ctx, grad_losses, _grad_lse):
    logits, target, weight, lse = ctx.saved_tensors
    args = (grad_losses, logits, target, weight, lse, *ctx.math, ctx.backend)
    if ctx.inplace:
        row_grad_(*args)
        grad_logits = logits.detach()
    else:
        grad_logits = row_grad(*args)
    return (grad_logits, *[None] * (2 + _MATH_FIELDS + 3))


torch.library.register_autograd("fused_sft_loss::token_losses", _backward, setup_context=_save)


@torch.library.custom_op(
    "fused_sft_loss::token_metrics",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor target, Tensor weight, {_MATH}, str group_name, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def token_metrics(logits, target, weight, *rest):
    """(loss, log_prob, lse, correct, entropy), `[N]` each, of one read of the scored rows."""
    math, (group_name, backend) = RowMath(*rest[:_MATH_FIELDS]), rest[_MATH_FIELDS:]
    gathered = merged_rows(logits, target, weight, math, group_name, backend, 6)
    return choose.load(backend).merge_metrics(gathered, target, weight, math)


@token_metrics.register_fake
def _(logits, target, weight, *rest):
    vectors = [torch.empty_like(weight) for _ in range(5)]
    vectors[3] = torch.empty_like(weight, dtype=torch.bool)
    return tuple(vectors)

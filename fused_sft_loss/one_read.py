"""grad_in_forward as torch.library operators: loss and gradient from one read of the logits.

Forward knows the gradient that backward is expected to get. So it reads each row once, and writes
its gradient to a buffer or over the logits. Backward compares the real gradient with the expected
one, row by row and on the device, and corrects the rows that were stored for another factor. With a
buffer the logits are unchanged: the rows are computed again, exactly. In place the rows are
multiplied by the ratio, which rounds a second time. See "One read" in docs/design.md.
"""

from typing import Any

import torch
from torch import Tensor

from .backends import selection
from .backends.contract import RowFactor, losses_like
from .inplace import traced
from .operators import differentiable, first_order, operator
from .rowmath import RowMath
from .targets import Targets, weighted_mean


def token_losses(
    logits: Tensor, targets: Targets, math: RowMath, backend: str, expected: Tensor, inplace: bool
) -> Tensor:
    """weight * loss `[N]`, fp32, differentiable in the logits `[b, s, v]`. Backward runs once.

    `expected` is the gradient, 0-d, that backward is expected to get for each of the results. With
    `inplace`, the memory of the logits holds their gradient after this call.
    """
    target, weight = targets.target, targets.weight
    stored = RowFactor(expected, weight).values()
    inplace = inplace and not traced(logits)
    if inplace:
        stored = can_be_rescaled(stored, weight, logits.dtype)
    call = (logits.detach(), target, weight, stored, math, backend)
    if inplace:
        logits = _SameMemory.apply(logits)
        losses, normalizer = row_stats_grad_(*call)
        grad = None
    else:
        losses, normalizer, grad = row_stats_grad(*call)
    return with_grad(logits, losses, grad, target, weight, normalizer, stored, math, backend)


def expected_gradient(expected: bool | float | Tensor, weight_sum: Tensor, mean: bool) -> Tensor:
    """The expected gradient of each token's loss, 0-d.

    For the mean it is divided in the same way as autograd will divide it, so the bits are equal.
    """
    if not isinstance(expected, Tensor):
        expected = weight_sum.new_full((), float(expected))  # filled on the device, not copied
    return weighted_mean(expected.detach(), weight_sum) if mean else expected.detach()


#: In place, a row is stored for its expected factor if that lies between these numbers, else for
#: factor 1: a ratio cannot correct zeros and infinities. In fp16 the lower limit is 2^-24, the
#: smallest positive number.
STORED_FOR_ONE_BELOW = {torch.float16: 2.0**-24}
STORED_FOR_ITSELF = (2.0**-60, 2.0**60)


def can_be_rescaled(stored: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The factors `[N]` for which rows are stored in place. They stay 0 where the weight is 0."""
    least, most = STORED_FOR_ITSELF
    size = stored.abs()
    kept = (size >= STORED_FOR_ONE_BELOW.get(dtype, least)) & (size <= most)
    return torch.where(kept | (weight == 0), stored, 1.0)


class _SameMemory(torch.autograd.Function):
    """A tensor on the same storage that autograd does not treat as a view.

    Writing in place to a view makes autograd insert CopySlices, whose gradient copies the whole
    base. The losses are therefore attached to this result, whose place in the graph is made before
    the write.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@operator(
    "row_stats_grad(Tensor logits, Tensor target, Tensor weight, Tensor factor, RowMath math, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    lambda logits, target, weight, *rest: (*losses_like(weight), torch.empty_like(logits)),
)
def row_stats_grad(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Losses, normalizer, and the gradient of factor * loss."""
    out = torch.empty_like(logits)
    return (*_write(logits, *rest, out=out), out)


@operator(
    "row_stats_grad_(Tensor(a!) logits, Tensor target, Tensor weight, Tensor factor, RowMath math, "
    "str backend) -> (Tensor, Tensor)",
    lambda logits, target, weight, *rest: losses_like(weight),
    changes=0,
)
def row_stats_grad_(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """:func:`row_stats_grad`, with the gradient written over the logits."""
    return _write(logits, *rest, out=logits)


def _write(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    factor: Tensor,
    math: RowMath,
    backend: str,
    *,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    kernels = selection.load(backend)
    return kernels.row_stats_grad(logits, target, weight, factor, math.read(), out)


@operator(
    "row_regrad_(Tensor(a!) grad, Tensor upstream, Tensor logits, Tensor target, Tensor weight, "
    "Tensor normalizer, Tensor stored, RowMath math, str backend) -> ()",
    lambda *args: None,
    changes=0,
)
def row_regrad_(
    grad: Tensor,
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    normalizer: Tensor,
    stored: Tensor,
    math: RowMath,
    backend: str,
) -> None:
    """Compute again, for `upstream`, the rows of `grad` that were stored for another factor."""
    factor, kernels = RowFactor(upstream, weight), selection.load(backend)
    kernels.row_regrad(logits, normalizer, target, factor, math.read(), grad, stored)


@operator(
    "row_rescale_(Tensor(a!) grad, Tensor upstream, Tensor weight, Tensor stored, RowMath math, "
    "str backend) -> ()",
    lambda *args: None,
    changes=0,
)
def row_rescale_(
    grad: Tensor, upstream: Tensor, weight: Tensor, stored: Tensor, math: RowMath, backend: str
) -> None:
    """:func:`row_regrad_` for overwritten logits: multiply those rows by factor / stored."""
    factor = RowFactor(upstream, weight)
    selection.load(backend).row_rescale(grad, factor, stored, math.read())


class WithGrad(torch.autograd.Function):
    """The losses `[N]`, with the gradient that forward stored for the factors `stored` `[N]`.

    `grad` holds the gradient. If it is None, the memory of the logits holds it.
    """

    @staticmethod
    def forward(logits: Tensor, losses: Tensor, *rest: Any) -> Tensor:
        return losses.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        logits, _losses, grad, target, weight, normalizer, stored, *ctx.rest = inputs
        ctx.save_for_backward(logits, grad, target, weight, normalizer, stored)

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, grad, target, weight, normalizer, stored = ctx.saved_tensors
        if grad is None:
            grad = logits.clone() if traced(logits) else logits.detach()
            row_rescale_(grad, upstream, weight, stored, *ctx.rest)
        else:
            row_regrad_(grad, upstream, logits, target, weight, normalizer, stored, *ctx.rest)
        return (grad, *[None] * (6 + len(ctx.rest)))


with_grad = differentiable(
    "with_grad(Tensor logits, Tensor losses, Tensor? grad, Tensor target, Tensor weight, "
    "Tensor normalizer, Tensor stored, RowMath math, str backend) -> Tensor",
    WithGrad,
)

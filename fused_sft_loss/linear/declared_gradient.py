"""grad_in_forward of `linear_sft_loss`: its operator and autograd.Function.

Forward computes the gradients for the declared upstream gradient. Backward multiplies them, still
in fp32, by the ratio of the real one to the declared one: 1 if they are equal. A bf16 gradient of
hidden is held in bf16, so another ratio than a power of two rounds it a second time.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import groups
from ..backends import selection
from ..backends.contract import RowFactor
from ..one_read import STORED_FOR_ITSELF
from ..operators import differentiable, first_order, operator
from ..rowmath import RowMath
from . import main_grad, one_pass, products
from .function import COUNT, INPUTS, Inputs
from .tiles import CONVERTED_COLUMNS, slices


def stored_for(declared: Tensor) -> Tensor:
    """The upstream gradient of each loss that gradients are stored for, 0-d fp32.

    The declared one, or 1 where a ratio could not correct it; see STORED_FOR_ITSELF.
    """
    least, most = STORED_FOR_ITSELF
    size = declared.abs()
    return torch.where((size >= least) & (size <= most), declared, 1.0)


def _like(*args: Any) -> tuple[Tensor, ...]:
    """Uninitialised results of :func:`losses_and_gradients`."""
    inputs, wanted = Inputs(*args[:COUNT]), args[COUNT + 3]
    sums = one_pass.Sums.new(inputs.head, wanted)
    return tuple(sums.losses.new_empty(0) if grad is None else grad for grad in sums)


@operator(
    f"linear_losses_and_gradients({INPUTS}, Tensor stored, RowMath math, SymInt height, "
    "bool[] wanted, str group_name, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _like,
)
def losses_and_gradients(*args: Any) -> tuple[Tensor, ...]:
    """Losses `[R]`, and the gradients that are `wanted` of hidden, weight and bias, for an upstream
    gradient `stored` of each loss; an empty tensor in place of the others."""
    return _computed(Inputs(*args[:COUNT]), *args[COUNT:])


def _computed(
    inputs: Inputs,
    stored: Tensor,
    math: RowMath,
    height: int,
    wanted: list[bool],
    group_name: str,
    backend: str,
) -> tuple[Tensor, ...]:
    with products.without_autocast(inputs.hidden):
        sums = one_pass.losses_and_gradients(
            selection.load(backend),
            inputs.head,
            inputs.rows,
            RowFactor(stored, inputs.row_weight),
            math.read(),
            height,
            group_name,
            wanted,
        )
    return tuple(sums.losses.new_empty(0) if grad is None else grad for grad in sums)


class WithGradients(torch.autograd.Function):
    """The losses `[R]`, with the gradients that forward has computed for `stored`."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, losses: Tensor, *rest: Any
    ) -> Tensor:
        return losses.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.reduce_name, fused = inputs
        ctx.fused = main_grad.kept(inputs[1], fused)
        hidden, weight, bias, _losses, *rest = tensors
        ctx.save_for_backward(hidden, weight, bias, *rest)

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, positions, row_weight, stored, *sums = ctx.saved_tensors
        ratio = upstream / stored
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_hidden = of_hidden(hidden, positions, row_weight, sums[0], ratio, ctx.reduce_name)
        common = _common(ratio, row_weight)
        if ctx.needs_input_grad[1]:
            grad_weight = _of_weight(weight, sums[1], common, ctx.fused)
        if ctx.needs_input_grad[2]:
            grad_bias = (sums[2] * common).to(bias.dtype)
        return (grad_hidden, grad_weight, grad_bias, *[None] * 9)


@operator(
    "linear_grad_of_hidden(Tensor hidden, Tensor positions, Tensor row_weight, Tensor held, "
    "Tensor ratio, str reduce_name) -> Tensor",
    lambda hidden, *rest: torch.empty_like(hidden),
)
def of_hidden(
    hidden: Tensor,
    positions: Tensor,
    row_weight: Tensor,
    held: Tensor,
    ratio: Tensor,
    reduce_name: str,
) -> Tensor:
    """The gradient of hidden `[M, h]` from the one held for its rows `[R, h]`."""
    ratio = torch.where(row_weight != 0, ratio, 0.0).unsqueeze(-1)
    rows = torch.mul(held, ratio, out=torch.empty_like(held, dtype=hidden.dtype))
    if reduce_name and len(rows):
        dist.all_reduce(rows, group=groups.by_name(reduce_name))
    return torch.zeros_like(hidden).index_copy_(0, positions, rows)


def _common(ratio: Tensor, row_weight: Tensor) -> Tensor:
    """The ratio of all scored rows, 0-d; NaN if they differ, and 1 without such rows.

    A sum over rows cannot be corrected row by row.
    """
    if not len(ratio):
        return ratio.new_ones(())
    scored = row_weight != 0
    low = torch.where(scored, ratio, torch.inf).amin()
    high = torch.where(scored, ratio, -torch.inf).amax()
    return torch.where(scored.any(), torch.where(low == high, low, torch.nan), 1.0)


def _of_weight(weight: Tensor, held: Tensor, ratio: Tensor, fused: Tensor | None) -> Tensor | None:
    if fused is None:
        grad = torch.empty_like(weight)
        for part in slices(len(held), CONVERTED_COLUMNS):
            # A CPU multiplies into a temporary of `held`'s dtype first.
            torch.mul(held[part], ratio, out=grad[part])
        return grad
    kept = main_grad.of(fused)
    if kept.add:
        kept.memory.addcmul_(held, ratio)
    else:
        torch.mul(held, ratio, out=kept.memory)
    return main_grad.reported(fused)


with_gradients = differentiable(
    "linear_with_gradients(Tensor hidden, Tensor weight, Tensor? bias, Tensor losses, "
    "Tensor positions, Tensor row_weight, Tensor stored, Tensor grad_hidden, Tensor grad_weight, "
    "Tensor grad_bias, str reduce_name, bool into_main_grad) -> Tensor",
    WithGradients,
)

"""Hidden states of which each rank holds a part of the sequence."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gathered(part: Tensor, layout: str, group: ProcessGroup) -> Tensor:
    """The hidden states of the whole sequence, from those of all ranks."""
    sequence = 1 if part.dim() == 3 and layout == "bsv" else 0
    return _Gathered.apply(part, sequence, group)


def flattened(hidden: Tensor, layout: str) -> tuple[Tensor, bool]:
    """(`[M, h]`, by_sequence): row (b, s) is row s * batch + b if by_sequence, else b * seq + s.

    Without a copy if the memory of one of the two is contiguous.
    """
    by_sequence = hidden.dim() == 3 and layout == "sbv"
    if hidden.dim() == 3 and not hidden.is_contiguous():
        swapped = hidden.transpose(0, 1)
        if swapped.is_contiguous():
            hidden, by_sequence = swapped, not by_sequence
    return hidden.reshape(-1, hidden.shape[-1]), by_sequence


class _Gathered(torch.autograd.Function):
    """The parts of all ranks along a dimension. Backward sums the gradient over the ranks and
    scatters it, in its own dtype."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        first = part.transpose(0, dim).contiguous()
        whole = first.new_empty(group.size() * first.shape[0], *first.shape[1:])
        dist.all_gather(list(whole.chunk(group.size())), first, group=group)
        return whole.transpose(0, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        whole = grad.transpose(0, ctx.dim).contiguous()
        ranks, rank = ctx.group.size(), dist.get_rank(ctx.group)
        mine = torch.empty_like(whole.chunk(ranks)[rank])
        dist.reduce_scatter_tensor(mine, whole, group=ctx.group)
        return mine.transpose(0, ctx.dim), None, None

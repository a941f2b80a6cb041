"""Hidden states of which each rank holds a part of the sequence."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Gathered(torch.autograd.Function):
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

"""Loss and gradient by one pass over chunks of rows: forward computes both.

A chunk is some rows with all columns of this shard. Its gradient needs the statistics of all
shards, so under tensor parallelism they are gathered chunk by chunk; while a chunk's travel, the
product of the next chunk is computed, in a second buffer.

Three products of R x V x h, all forward. The gradient of the weight is a sum over chunks, and must
be held until backward: `[V_local, h]` in fp32.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import shards
from ..backends.contract import Backend, RowFactor, statistics_for
from ..rowmath import RowMath
from . import products
from .head import Head
from .rows import ScoredRows
from .tiles import slices


class Sums(NamedTuple):
    """Losses, and gradients as sums in fp32; None: not wanted."""

    losses: Tensor  # [R] fp32
    hidden: Tensor | None  # [R, h], see `held_dtype`
    weight: Tensor | None  # [V_local, h]
    bias: Tensor | None  # [V_local]

    @classmethod
    def new(cls, head: Head, wanted: list[bool]) -> "Sums":
        """Memory as `wanted` for hidden, weight and bias. The first chunk writes the sum of weight;
        without rows it is 0."""
        rows, (columns, width) = len(head.positions), head.weight.shape
        fp32 = head.weight.new_empty(0, dtype=torch.float32)
        new = fp32.new_empty if rows else fp32.new_zeros
        return cls(
            fp32.new_empty(rows),
            fp32.new_empty(rows, width, dtype=held_dtype(head.hidden)) if wanted[0] else None,
            new(columns, width) if wanted[1] else None,
            fp32.new_zeros(columns) if wanted[2] else None,
        )


def held_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which the gradient of hidden is held until backward.

    fp16 would be too small for a gradient that a loss scale has not lifted yet.
    """
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


class _Chunk(NamedTuple):
    """A chunk whose statistics are under way."""

    rows: slice
    inputs: Tensor  # [r, h]
    logits: Tensor  # [1, r, V_local]
    gathered: shards.Gathering


def losses_and_gradients(
    kernels: Backend,
    head: Head,
    rows: ScoredRows,
    factor: RowFactor,
    math: RowMath,
    height: int,
    group_name: str,
    wanted: list[bool],
) -> Sums:
    """The losses of the rows, and the gradients of the sum of factor * loss.

    height: rows of a chunk, the same on all ranks.
    """
    sums = Sums.new(head, wanted)
    under_way: deque[_Chunk] = deque()
    for chunk in _chunks(kernels, head, rows, math, height, group_name):
        under_way.append(chunk)
        if len(under_way) == _buffers(group_name):
            _finish(kernels, head, rows, factor, math, under_way.popleft(), sums)
    for chunk in under_way:
        _finish(kernels, head, rows, factor, math, chunk, sums)
    return sums


def _chunks(
    kernels: Backend, head: Head, rows: ScoredRows, math: RowMath, height: int, group_name: str
) -> Iterator[_Chunk]:
    """Compute the logits and statistics of each chunk, in the memory of the oldest one."""
    columns = len(head.weight)
    height = max(1, min(height, len(head.positions)))
    dtype = products.dtype_of_products(head.hidden)
    buffers = head.weight.new_empty(_buffers(group_name), height * columns, dtype=dtype)
    for number, some in enumerate(slices(len(head.positions), height)):
        inputs = head.inputs(some)
        logits = buffers[number % len(buffers)][: len(inputs) * columns].view(1, -1, columns)
        for part in slices(len(head.weight), head.widest):
            head.multiply(inputs, head.weight_of(part), part, logits[0, :, part])
        stats = kernels.row_stats(
            logits, rows.target[some], rows.weight[some], math, statistics_for(math)
        )
        yield _Chunk(some, inputs, logits, shards.Gathering(stats, group_name))


def _buffers(group_name: str) -> int:
    """Chunks under way at once: two if statistics travel."""
    return 2 if group_name else 1


def _finish(
    kernels: Backend,
    head: Head,
    rows: ScoredRows,
    factor: RowFactor,
    math: RowMath,
    chunk: _Chunk,
    sums: Sums,
) -> None:
    """Compute the chunk's losses, and add its gradients."""
    some = chunk.rows
    target = rows.target[some]
    losses, normalizer = kernels.merge(chunk.gathered.finished(), target, rows.weight[some], math)
    sums.losses[some] = losses
    if sums.hidden is None and sums.weight is None and sums.bias is None:
        return
    kernels.row_grad(chunk.logits, normalizer, target, factor.of_rows(some), math, chunk.logits)
    grad = chunk.logits[0]
    grad_inputs = torch.zeros_like(chunk.inputs, dtype=torch.float32)
    add_weight = products.accumulate if some.start else products.multiply_into
    for part in slices(len(head.weight), head.widest):
        if sums.hidden is not None:
            products.accumulate(grad_inputs, grad[:, part], head.weight_of(part))
        if sums.weight is not None:
            add_weight(sums.weight[part], grad[:, part].t(), chunk.inputs)
    if sums.hidden is not None:
        sums.hidden[some] = grad_inputs
    if sums.bias is not None:
        sums.bias.add_(grad.sum(0, dtype=torch.float32))

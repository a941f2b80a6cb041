"""Loss and gradient by one pass over chunks of rows: forward computes both.

A chunk is some rows with all columns of this shard. Its gradient needs the statistics of all
shards, so under tensor parallelism they are gathered chunk by chunk; while a chunk's travel, the
products of its neighbours are computed, in a second buffer.

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

    @property
    def differentiates(self) -> bool:
        """Whether any gradient is wanted."""
        return any(grad is not None for grad in self[1:])

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
    """Some rows, with the logits of all columns."""

    rows: slice
    inputs: Tensor  # [r, h]
    grad_inputs: Tensor  # [r, h] fp32, a sum over columns
    logits: Tensor  # [1, r, V_local], later their gradient


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
    buffers = 2 if group_name else 1  # chunks under way at once: two if statistics travel
    chunks = _chunks(head, height, buffers)
    under_way: deque[tuple[_Chunk, shards.Gathering]] = deque()
    begun = next(chunks, None)
    while begun or under_way:
        done = None
        if begun is None or len(under_way) == buffers:
            done, gathering = under_way.popleft()
            _differentiate(kernels, rows, factor, math, done, gathering.finished(), sums)
        if begun is not None or sums.differentiates:
            _multiply(head, done if sums.differentiates else None, begun, sums)
        if begun is not None:
            target, weight = rows.target[begun.rows], rows.weight[begun.rows]
            stats = kernels.row_stats(begun.logits, target, weight, math, statistics_for(math))
            under_way.append((begun, shards.Gathering(stats, group_name)))
        begun = next(chunks, None)
    return sums


def _chunks(head: Head, height: int, buffers: int) -> Iterator[_Chunk]:
    """Each chunk is in the memory of the one that is `buffers` before it."""
    columns = len(head.weight)
    height = max(1, min(height, len(head.positions)))
    dtype = products.dtype_of_products(head.hidden)
    memory = head.weight.new_empty(buffers, height, columns, dtype=dtype)
    for number, some in enumerate(slices(len(head.positions), height)):
        logits = memory[number % buffers, None, : some.stop - some.start]
        inputs = head.inputs(some)
        yield _Chunk(some, inputs, torch.zeros_like(inputs, dtype=torch.float32), logits)


def _differentiate(
    kernels: Backend,
    rows: ScoredRows,
    factor: RowFactor,
    math: RowMath,
    chunk: _Chunk,
    gathered: Tensor,
    sums: Sums,
) -> None:
    """Compute the losses of a chunk, and overwrite its logits by their gradient."""
    some = chunk.rows
    target = rows.target[some]
    losses, normalizer = kernels.merge(gathered, target, rows.weight[some], math)
    sums.losses[some] = losses
    if sums.differentiates:
        kernels.row_grad(chunk.logits, normalizer, target, factor.of_rows(some), math, chunk.logits)
    if sums.bias is not None:
        sums.bias.add_(chunk.logits[0].sum(0, dtype=torch.float32))


def _multiply(head: Head, done: _Chunk | None, begun: _Chunk | None, sums: Sums) -> None:
    """Add the gradients of the chunk that is `done`, and compute the logits of the one `begun`.

    Both walk over the weight together: it is read, and on some CPUs converted, once for both. They
    may share memory: the logits of a part of the columns overwrite a gradient that was used.
    """
    for part in slices(len(head.weight), head.widest):
        _multiply_part(head, done, begun, sums, part)
    if done is not None and sums.hidden is not None:
        sums.hidden[done.rows] = done.grad_inputs


def _multiply_part(
    head: Head, done: _Chunk | None, begun: _Chunk | None, sums: Sums, part: slice
) -> None:
    """:func:`_multiply` for some columns."""
    weight = head.weight_of(part)
    if done is not None:
        grad = done.logits[0, :, part]
        if sums.hidden is not None:
            products.accumulate(done.grad_inputs, grad, weight)
        if sums.weight is not None:
            add = products.accumulate if done.rows.start else products.multiply_into
            add(sums.weight[part], grad.t(), done.inputs)
    if begun is not None:
        head.multiply(begun.inputs, weight, part, begun.logits[0, :, part])

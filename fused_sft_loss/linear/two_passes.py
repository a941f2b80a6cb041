"""Loss and gradient by two passes over the tiles: statistics forward, the gradient backward.

A tile of columns is to the row kernels what a shard of the vocabulary is: its statistics are merged
with those of the other tiles, and its gradient needs nothing but the rows' normalizer. So backward
completes the gradient of the weight tile by tile, without an fp32 copy of it. Only the gradient of
the hidden states is a sum over tiles, `[R, h]` in fp32.

Four products of R x V x h: one forward, three backward.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import shards
from ..backends.contract import Backend, RowFactor
from ..rowmath import RowMath
from . import products
from .gradients import Gradients, WeightTile
from .head import Head
from .rows import ScoredRows
from .tiles import Tiling


def gathered_statistics(
    kernels: Backend,
    head: Head,
    rows: ScoredRows,
    math: RowMath,
    size: int,
    group_name: str,
    statistics: int,
) -> Tensor:
    """The statistics of all tiles or shards, `[parts, R, statistics]`, not merged yet.

    size: logits of a tile.
    """
    inputs, tiling = head.inputs(), tiling_of(head, math, size)
    tile = inputs.new_empty(tiling.rows * tiling.columns)
    parts = rows.weight.new_zeros(max(1, tiling.tiles_per_row), len(inputs), statistics)
    for part, columns in zip(parts, tiling.columns_of_tiles(), strict=False):
        weight, here = head.weight_of(columns), math.from_column(columns.start)
        for some in tiling.rows_of_tiles():
            logits = _logits(head, inputs[some], weight, columns, tile)
            part[some] = kernels.row_stats(
                logits, rows.target[some], rows.weight[some], here, statistics
            )
        del weight  # a converted copy, before the next one is made
    if not group_name or not len(inputs):
        return parts
    return shards.gather(shards.fold(parts, math.unit), group_name)


def gradients(
    kernels: Backend,
    head: Head,
    rows: ScoredRows,
    normalizer: Tensor,
    factor: RowFactor,
    math: RowMath,
    size: int,
    into: Gradients,
    group: ProcessGroup | None,
) -> None:
    """Write the gradients of hidden states, weight and bias `into` their places.

    That of the hidden states is summed over the group, in their dtype, as Megatron's own layer
    does.
    """
    inputs, tiling = head.inputs(), tiling_of(head, math, size)
    tile = inputs.new_empty(tiling.rows * tiling.columns)
    grad_inputs: Tensor | None = None
    if into.hidden is not None:
        grad_inputs = inputs.new_zeros(inputs.shape, dtype=torch.float32)
    for columns in tiling.columns_of_tiles():
        weight, here = head.weight_of(columns), math.from_column(columns.start)
        weight_tile = WeightTile(into, columns, tiling.whole_height)
        for some in tiling.rows_of_tiles():
            logits = _logits(head, inputs[some], weight, columns, tile)
            kernels.row_grad(
                logits, normalizer[some], rows.target[some], factor.of_rows(some), here, logits
            )
            grad = logits[0]
            if grad_inputs is not None:
                products.accumulate(grad_inputs[some], grad, weight)
            weight_tile.add(grad, inputs[some])
        weight_tile.finish()
        del weight  # as above
    into.clear_from(tiling.all_columns)
    del inputs  # their memory serves the next line
    if into.hidden is not None and grad_inputs is not None:
        grad_rows = grad_inputs.to(into.hidden.dtype)
        if group is not None and len(grad_rows):
            dist.all_reduce(grad_rows, group=group)
        into.hidden.index_copy_(0, head.positions, grad_rows)


def _logits(head: Head, inputs: Tensor, weight: Tensor, columns: slice, tile: Tensor) -> Tensor:
    """Compute logits `[1, r, c]` in the memory of the tile."""
    rows, width = len(inputs), len(weight)
    logits = tile[: rows * width].view(1, rows, width)
    head.multiply(inputs, weight, columns, logits[0])
    return logits


def tiling_of(head: Head, math: RowMath, size: int) -> Tiling:
    """Tiles that cover the rows and the columns of the vocabulary, not its padding.

    A shard of padding alone has one column, whose statistics are those of no column.
    """
    columns = max(1, math.valid_columns(len(head.weight)))
    rows = len(head.positions)
    return Tiling.of(size, rows, columns if rows else 0, head.widest)

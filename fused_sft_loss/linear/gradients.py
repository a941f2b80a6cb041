"""Where the gradients of an output layer go."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import products


@dataclass
class Gradients:
    """The memory of the gradients; None: not wanted, and not computed."""

    hidden: Tensor | None  # [M, h]; the rows that go through the layer are written
    weight: Tensor | None  # [V_local, h]; written
    bias: Tensor | None  # [V_local]; written
    add: bool = False  # `weight` is added to instead: it holds a sum over micro-batches

    def clear_from(self, column: int) -> None:
        """Write zeros for columns that have no gradient: padding of the vocabulary."""
        if self.weight is not None and not self.add:
            self.weight[column:].zero_()
        if self.bias is not None:
            self.bias[column:].zero_()


class WeightTile:
    """The gradients of weight and bias for some columns, a sum over tiles of rows.

    The sum is fp32 and rounded once. Where one tile has all rows, the product itself is that sum,
    and is written in place.
    """

    def __init__(self, into: Gradients, columns: slice, whole: bool) -> None:
        self.into, self.whole = into, whole
        self.weight = None if into.weight is None else into.weight[columns]
        self.bias = None if into.bias is None else into.bias[columns]
        self.weight_sum: Tensor | None = None
        self.bias_sum: Tensor | None = None

    def add(self, grad: Tensor, inputs: Tensor) -> None:
        """Add grad.T @ inputs, for a tile's gradient `[r, c]` and its inputs `[r, h]`."""
        if self.weight is not None:
            self._add_weight(self.weight, grad.t(), inputs)
        if self.bias is not None:
            part = grad.sum(0, dtype=torch.float32)
            self.bias_sum = part if self.bias_sum is None else self.bias_sum.add_(part)

    def _add_weight(self, weight: Tensor, grad: Tensor, inputs: Tensor) -> None:
        if self.into.add and weight.dtype == torch.float32:
            products.accumulate(weight, grad, inputs)
        elif self.whole and not self.into.add:
            products.multiply(grad, inputs, weight)
        elif self.weight_sum is None:
            self.weight_sum = weight.new_empty(weight.shape, dtype=torch.float32)
            products.multiply(grad, inputs, self.weight_sum)
        else:
            products.accumulate(self.weight_sum, grad, inputs)

    def finish(self) -> None:
        """Round the sums into their places."""
        if self.weight is not None and self.weight_sum is not None:
            (self.weight.add_ if self.into.add else self.weight.copy_)(self.weight_sum)
        if self.bias is not None and self.bias_sum is not None:
            self.bias.copy_(self.bias_sum)

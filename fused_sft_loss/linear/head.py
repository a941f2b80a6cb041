"""An output layer, and the hidden states that go through it."""

from typing import NamedTuple

from torch import Tensor

from . import products


class Head(NamedTuple):
    """The logits of row i are ``hidden[positions[i]] @ weight.T + bias``."""

    hidden: Tensor  # [M, h]
    positions: Tensor  # [R] int64
    weight: Tensor  # [V_local, h], the dtype of hidden
    bias: Tensor | None  # [V_local]

    def inputs(self) -> Tensor:
        """The rows that are multiplied, `[R, h]`, in :func:`.dtype_of_products`."""
        return self.hidden.index_select(0, self.positions).to(
            products.dtype_of_products(self.hidden)
        )

    def weight_of(self, columns: slice) -> Tensor:
        return self.weight[columns].to(products.dtype_of_products(self.hidden))

    def logits(self, inputs: Tensor, weight: Tensor, columns: slice, tile: Tensor) -> Tensor:
        """Compute a tile of logits `[1, r, c]` in the memory `tile`.

        inputs `[r, h]` and weight `[c, h]` are parts of `inputs()` and `weight_of(columns)`.
        """
        rows, width = len(inputs), len(weight)
        logits = tile[: rows * width].view(rows, width)
        bias = None if self.bias is None else self.bias[columns].to(logits.dtype)
        products.multiply(inputs, weight.t(), logits, bias)
        return logits.unsqueeze(0)

"""An output layer, and the hidden states that go through it."""

from typing import NamedTuple

from torch import Tensor

from . import products
from .tiles import CONVERTED_COLUMNS


class Head(NamedTuple):
    """The logits of row i are ``hidden[positions[i]] @ weight.T + bias``."""

    hidden: Tensor  # [M, h]
    positions: Tensor  # [R] int64
    weight: Tensor  # [V_local, h], the dtype of hidden
    bias: Tensor | None  # [V_local]
    row_weight: Tensor  # [R]

    def inputs(self, rows: slice = slice(None)) -> Tensor:
        """Rows that are multiplied, `[r, h]`, in :func:`.dtype_of_products`.

        Rows with weight 0, which only fill up the number, are zeros: NaN in a masked row would
        reach the gradient of the weight as 0 * NaN.
        """
        chosen = self.hidden.index_select(0, self.positions[rows])
        chosen.masked_fill_((self.row_weight[rows] == 0).unsqueeze(1), 0.0)
        return chosen.to(products.dtype_of_products(self.hidden))

    @property
    def widest(self) -> int:
        """Columns that are multiplied at once: all, or a part if the weight is converted first."""
        converts = products.dtype_of_products(self.hidden) != self.weight.dtype
        return CONVERTED_COLUMNS if converts else len(self.weight)

    def weight_of(self, columns: slice) -> Tensor:
        """The weight of some columns, `[c, h]`, in :func:`.dtype_of_products`."""
        return self.weight[columns].to(products.dtype_of_products(self.hidden))

    def multiply(self, inputs: Tensor, weight: Tensor, columns: slice, out: Tensor) -> None:
        """Write the logits `[r, c]` of inputs `[r, h]` and of ``weight_of(columns)``."""
        bias = None if self.bias is None else self.bias[columns].to(out.dtype)
        products.multiply(inputs, weight.t(), out, bias)

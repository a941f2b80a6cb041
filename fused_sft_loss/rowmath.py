"""The numbers that define a loss, as one record from the API to the kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from .options import check_scale

#: The fields of RowMath in an operator's schema. torch.compile would compile anew for each value of
#: a float, so logit_scale travels as a 0-d CPU tensor.
SCHEMA = (
    "float label_smoothing, float z_loss, float softcap, Tensor logit_scale, "
    "SymInt vocab_start, SymInt vocab_size"
)


class RowMath(NamedTuple):
    """loss = (1-eps) * (lse - z_y) + eps * (lse - mean z) + z_loss * lse^2, with eps =
    label_smoothing.

    z = softcap * tanh(logit_scale * x / softcap), or logit_scale * x where softcap is 0; infinities
    pass the cap unchanged, so a masked-out column (-inf) stays out and +inf surfaces as NaN. lse
    and the mean run over the global vocabulary [0, vocab_size); columns beyond it are padding.
    Smoothing is that of ``torch.nn.functional.cross_entropy``; the z-loss that of PaLM (arXiv
    2204.02311, section 5).

    struct RowMath of csrc/args.h has the same fields in the same order.
    """

    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none
    logit_scale: float | Tensor  # a Tensor, 0-d on the CPU, only while torch.compile traces
    vocab_start: int  # global id of this shard's column 0
    vocab_size: int  # true global vocabulary

    def packed(self) -> tuple:
        """The fields as SCHEMA takes them."""
        scale = self.logit_scale
        if not isinstance(scale, Tensor):
            scale = torch.tensor(float(scale), dtype=torch.float64, device="cpu")
        return self._replace(logit_scale=scale)

    def read(self) -> "RowMath":
        """The record with a number for logit_scale, which is checked: not before an operator runs,
        where torch.compile passes on a tensor."""
        if not isinstance(self.logit_scale, Tensor):
            return self
        scale = float(self.logit_scale)
        check_scale(scale, self.softcap)
        return self._replace(logit_scale=scale)

    @property
    def unit(self) -> float:
        """z = unit * x, x being the capped logit under a softcap and the raw one otherwise.

        Statistics are in units of this x: a difference of neighbouring x is exact, and one of
        rounded products unit * x is not.
        """
        return 1.0 if self.softcap else float(self.logit_scale)

    def valid_columns(self, columns: int) -> int:
        """How many of a shard's `columns` are vocabulary rather than padding."""
        return max(0, min(columns, self.vocab_size - self.vocab_start))

"""What is computed on a row: the options every kernel of every backend takes, and nothing else."""

from typing import NamedTuple

import torch
from torch import Tensor

from .options import check_scale

#: The same fields as an operator schema; see ``autograd.py``. torch.compile would compile
#: anew for each value of a float, so logit_scale travels as a 0-d CPU tensor.
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
    """

    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none
    logit_scale: float | Tensor  # a 0-d CPU tensor on its way through operators
    vocab_start: int  # global id of this shard's column 0
    vocab_size: int  # true global vocabulary

    @classmethod
    def of_arguments(cls, *arguments) -> "RowMath":
        """From an operator's arguments, which :meth:`arguments` made."""
        math = cls(*arguments)
        scale = float(math.logit_scale)
        check_scale(scale, math.softcap)
        return math._replace(logit_scale=scale)

    def arguments(self) -> tuple:
        """The fields as an operator takes them."""
        scale = self.logit_scale
        if not isinstance(scale, Tensor):
            scale = torch.tensor(float(scale), dtype=torch.float64, device="cpu")
        return self._replace(logit_scale=scale)

    @property
    def unit(self) -> float:
        """z = unit * x, x being the capped logit under a softcap and the raw one otherwise.

        Statistics are in units of this x: a difference of neighbouring x is exact, and one of
        rounded products unit * x is not.
        """
        return 1.0 if self.softcap else self.logit_scale

    def valid_columns(self, columns: int) -> int:
        """How many of a shard's `columns` are vocabulary rather than padding."""
        return max(0, min(columns, self.vocab_size - self.vocab_start))

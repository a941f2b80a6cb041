"""The numbers that define a loss, as one record from the API to the kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from .options import Options, check_scale

#: Up to this softcap the GPU kernels use a short formula, whose error grows with the cap: small_cap
#: of csrc/gpu/row_math.cuh, which calls it kMostSmallCap.
MOST_SMALL_CAP = 32.0


class RowMath(NamedTuple):
    """loss = (1-eps) * (lse - z_y) + eps * (lse - mean z) + z_loss * lse^2, with eps =
    label_smoothing.

    z = softcap * tanh(logit_scale * x / softcap), or logit_scale * x if softcap is 0. Infinities
    are not capped: a masked-out column (-inf) stays out, and +inf makes the loss NaN. lse and the
    mean run over the global vocabulary [0, vocab_size). Columns beyond it are padding. Smoothing is
    defined as in ``torch.nn.functional.cross_entropy``, the z-loss as in PaLM (arXiv 2204.02311,
    section 5).

    struct RowMath of csrc/args.h has the same fields in the same order.
    """

    vocab_start: int  # global id of this shard's column 0
    vocab_size: int  # true global vocabulary
    label_smoothing: float = Options.label_smoothing
    z_loss: float = Options.z_loss
    softcap: float = 0.0  # none
    # a Tensor, 0-d on the CPU, only while torch.compile traces
    logit_scale: float | Tensor = Options.logit_scale

    @classmethod
    def of(cls, options: Options, vocab_start: int, vocab_size: int) -> "RowMath":
        """The numbers of a call with these options, on the shard that begins at vocab_start."""
        return cls(
            vocab_start,
            vocab_size,
            label_smoothing=float(options.label_smoothing),
            z_loss=float(options.z_loss),
            softcap=float(options.softcap or 0.0),
            logit_scale=options.logit_scale,
        )

    def packed(self) -> tuple:
        """The fields as SCHEMA takes them."""
        scale = self.logit_scale
        if not isinstance(scale, Tensor):
            scale = torch.tensor(float(scale), dtype=torch.float64, device="cpu")
        return self._replace(logit_scale=scale)

    def read(self) -> "RowMath":
        """The record with logit_scale as a checked number.

        Operators call it when they run: while torch.compile traces, logit_scale may be a tensor
        whose value is unknown.
        """
        if not isinstance(self.logit_scale, Tensor):
            return self
        scale = float(self.logit_scale)
        check_scale(scale, self.softcap)
        return self._replace(logit_scale=scale)

    @property
    def unit(self) -> float:
        """The factor in z = unit * x. x is the capped logit with a softcap, else the raw logit.

        Statistics hold this x and not z: a difference of two close x is exact, a difference of two
        rounded products unit * x is not.
        """
        return 1.0 if self.softcap else float(self.logit_scale)

    @property
    def cap(self) -> int:
        """enum Cap of csrc/gpu/row_math.cuh: 0 no softcap, 1 a small one, 2 a large one."""
        return (self.softcap > 0) + (self.softcap > MOST_SMALL_CAP)

    def valid_columns(self, columns: int) -> int:
        """How many of a shard's `columns` are vocabulary, not padding."""
        return max(0, min(columns, self.vocab_size - self.vocab_start))

    def from_column(self, column: int) -> "RowMath":
        """The record of the shard that begins at this column of the present one."""
        return self._replace(vocab_start=self.vocab_start + column)


_KINDS = {int: "SymInt", float: "float", float | Tensor: "Tensor"}
#: The fields of RowMath in an operator's schema. logit_scale is a 0-d CPU tensor there, because
#: torch.compile would compile again for each new value of a float.
SCHEMA = ", ".join(f"{_KINDS[kind]} {name}" for name, kind in RowMath.__annotations__.items())

"""The options of a loss, and the checks that do not depend on the batch."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .targets import IGNORE_INDEX

FP32 = torch.finfo(torch.float32)
RANGE = "a normal fp32 number (1.2e-38 to 3.4e38)"


@dataclass(frozen=True)
class Options:
    """The keyword options of :func:`sft_loss` except reduction; it describes them."""

    shift: bool = True
    layout: str = "bsv"
    cu_seqlens: Tensor | None = None
    ignore_index: int = IGNORE_INDEX
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float | Tensor = 1.0
    vocab_size: int | None = None
    tp_group: Any = None
    vocab_start: int | None = None
    inplace_backward: bool = False
    grad_in_forward: bool | float | Tensor = False
    backend: str | None = None

    def validate(self, per_sample: bool = False) -> None:
        """Raise TypeError or ValueError for options that are wrong for every batch.

        per_sample: cu_seqlens also says which tokens form a sample.
        """
        expect(self.layout in ("bsv", "sbv"), "layout 'bsv' or 'sbv'", self.layout)
        for name, kind in KINDS.items():
            if type(getattr(self, name)) not in kind.usual:
                _typed(self, name, kind)
        expect(
            -(2**63) <= self.ignore_index < 2**63, "ignore_index within int64", self.ignore_index
        )
        expect(
            self.label_smoothing == 0 or FP32.tiny <= self.label_smoothing < 1.0 - 2.0**-25,
            "0 <= label_smoothing < 1 (where not 0, from 1.2e-38 to 1 - 6e-8)",
            self.label_smoothing,
        )
        expect(
            self.z_loss == 0 or in_fp32(self.z_loss),
            f"z_loss 0 or positive and {RANGE}",
            self.z_loss,
        )
        expect(
            self.softcap is None or in_fp32(self.softcap),
            f"softcap None or positive and {RANGE}",
            self.softcap,
        )
        if isinstance(self.logit_scale, Tensor):
            _readable(self.logit_scale)
        else:
            check_scale(self.logit_scale, self.softcap)
        expect(
            self.vocab_size is None or self.vocab_size > 0,
            "vocab_size > 0 or None",
            self.vocab_size,
        )
        if self.cu_seqlens is not None and not self.shift and not per_sample:
            raise ValueError(
                "expected no cu_seqlens with shift=False, where labels are taken as they are and "
                "there is no neighbour to look at; pass it to shift_targets, or use shift=True "
                '(reduction="sample_mean" takes both)'
            )
        expected = self.grad_in_forward
        if isinstance(expected, Tensor):
            good = expected.dim() == 0 and expected.is_floating_point()
        else:
            good = isinstance(expected, (bool, int, float)) and abs(expected) < float("inf")
        expect(good, "grad_in_forward False, True, a finite number or a 0-d float tensor", expected)

    @property
    def one_read(self) -> bool:
        """Whether forward is asked to compute the gradient too."""
        expected = self.grad_in_forward
        return isinstance(expected, Tensor) or (expected is not False and expected != 0)


def in_fp32(value: float) -> bool:
    """Whether a number is positive and normal in fp32, in which the kernels compute."""
    return FP32.tiny <= value <= FP32.max


class _Kind(NamedTuple):
    """The types of an option. Those in `usual` are checked without the slower ABC check."""

    named: str
    types: tuple[type, ...]
    usual: tuple[type, ...]


_BOOL = _Kind("a bool", (bool,), (bool,))
_INT = _Kind("an int", (Integral,), (int,))
_NUMBER = _Kind("a number", (Real,), (float, int))
_SCALE = _Kind("a number or a 0-d CPU tensor", (Real, Tensor), (float, int))
KINDS = {
    **dict.fromkeys(("shift", "inplace_backward"), _BOOL),
    **dict.fromkeys(("ignore_index", "vocab_size", "vocab_start"), _INT),
    **dict.fromkeys(("label_smoothing", "z_loss", "softcap"), _NUMBER),
    "logit_scale": _SCALE,
}


def _typed(options: Options, name: str, kind: _Kind) -> None:
    """Raise TypeError unless the option has one of its types, or is None and None is its default.
    A bool is not accepted as a number."""
    value = getattr(options, name)
    if value is None and getattr(Options, name) is None:
        return
    if not isinstance(value, kind.types) or (isinstance(value, bool) and bool not in kind.types):
        raise TypeError(f"expected {name} to be {kind.named}, got {type(value).__name__} {value!r}")


def expect(holds: bool, expected: str, got: object) -> None:
    """Raise ValueError unless it holds."""
    if not holds:
        raise ValueError(f"expected {expected}, got {got!r}")


def check_scale(logit_scale: float, softcap: float | None) -> None:
    """Raise ValueError unless logit_scale, and its ratio to a softcap, are normal in fp32."""
    expect(in_fp32(logit_scale), f"logit_scale positive and {RANGE}", logit_scale)
    if softcap:
        ratio = logit_scale / softcap
        expect(in_fp32(ratio), f"logit_scale / softcap {RANGE}", ratio)


def _readable(logit_scale: Tensor) -> None:
    """Raise ValueError unless it is a 0-d CPU tensor without requires_grad."""
    if logit_scale.requires_grad:
        raise ValueError(
            "expected logit_scale without requires_grad, got a tensor that wants a gradient, which "
            "the loss does not compute. Multiply the logits by it (z = scale * logits) and leave "
            "logit_scale out, or pass logit_scale.detach()"
        )
    if logit_scale.dim() or logit_scale.device.type != "cpu":
        raise ValueError(
            "expected logit_scale to be a number or a 0-d CPU tensor, got "
            f"{list(logit_scale.shape)} on {logit_scale.device}; a tensor on an accelerator could "
            "be read only by waiting for it"
        )

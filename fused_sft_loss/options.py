"""The options of a loss, and whether they can be right whatever the tensors."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Options:
    """The keyword options of :func:`sft_loss` but reduction; see there."""

    shift: bool = True
    layout: str = "bsv"
    cu_seqlens: Tensor | None = None
    ignore_index: int = -100
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

    def validate(self) -> None:
        """Raise ValueError for options that are wrong whatever the tensors."""
        expect(self.layout in ("bsv", "sbv"), "layout 'bsv' or 'sbv'", self.layout)
        for name in ("label_smoothing", "z_loss", "softcap"):
            if isinstance(value := getattr(self, name), Tensor):
                raise TypeError(
                    f"expected {name} to be a number, got {value!r}; pass {name}.item()"
                )
        expect(0.0 <= self.label_smoothing < 1.0, "0 <= label_smoothing < 1", self.label_smoothing)
        expect(0.0 <= self.z_loss < float("inf"), "a finite z_loss >= 0", self.z_loss)
        expect(
            self.softcap is None or 0.0 < self.softcap < float("inf"),
            "softcap > 0 or None",
            self.softcap,
        )
        _scale(self.logit_scale)
        expect(
            self.vocab_size is None or self.vocab_size > 0,
            "vocab_size > 0 or None",
            self.vocab_size,
        )
        if self.cu_seqlens is not None and not self.shift:
            raise ValueError(
                "expected no cu_seqlens with shift=False, where labels are taken as they are and "
                "there is no neighbour to look at; pass it to shift_targets, or use shift=True"
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


def expect(holds: bool, expected: str, got) -> None:
    """Raise ValueError unless it holds."""
    if not holds:
        raise ValueError(f"expected {expected}, got {got!r}")


def _scale(logit_scale: float | Tensor) -> None:
    """Raise unless it is a positive number or may be read as one without waiting for a device."""
    if not isinstance(logit_scale, Tensor):
        expect(0.0 < logit_scale < float("inf"), "a finite logit_scale > 0", logit_scale)
    elif logit_scale.requires_grad:
        raise ValueError(
            "expected logit_scale without requires_grad, got a tensor that wants a gradient, which "
            "the loss does not compute. Multiply the logits by it (z = scale * logits) and leave "
            "logit_scale out, or pass logit_scale.detach()"
        )
    elif logit_scale.dim() or logit_scale.device.type != "cpu":
        raise ValueError(
            "expected logit_scale to be a number or a 0-d CPU tensor, got "
            f"{list(logit_scale.shape)} on {logit_scale.device}; a tensor on an accelerator could "
            "be read only by waiting for it"
        )

"""The temperature of token_logprobs: one number for all tokens, or one for each token."""

from numbers import Real

import torch
from torch import Tensor

from . import checks
from .options import FP32, expect
from .rowmath import RowMath

#: A temperature and its reciprocal must be normal in fp32, in which the kernels compute.
LEAST, MOST = FP32.tiny, 1 / FP32.tiny
EXPECTED = "temperature positive, from 1.2e-38 to 8.5e+37"


def check(temperature: object, labels: Tensor) -> None:
    """Raise TypeError or ValueError for a wrong temperature. Reads the value of a number, and of a
    0-d CPU tensor unless torch.compile traces; `check_values` reads those of tokens."""
    if temperature is None:
        return
    if isinstance(temperature, Tensor):
        checks.are_tensors(temperature=temperature)
        _check_tensor(temperature, labels)
        if of_tokens(temperature) or torch.compiler.is_compiling():
            return
        temperature = float(temperature)
    elif isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(
            "expected temperature to be None, a number, or a tensor that is 0-d or in the labels' "
            f"shape, got {type(temperature).__name__} {temperature!r}"
        )
    expect(LEAST <= float(temperature) <= MOST, EXPECTED, temperature)


def _check_tensor(temperature: Tensor, labels: Tensor) -> None:
    if temperature.dtype == torch.bool or temperature.is_complex():
        raise TypeError(f"expected temperature to hold real numbers, got {temperature.dtype}")
    if temperature.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "expected temperature without requires_grad, got a tensor that wants a gradient, which "
            "is not computed. Pass temperature.detach(), or divide the logits by it yourself"
        )
    if not temperature.dim():
        return
    if temperature.shape != labels.shape:
        raise ValueError(
            f"expected temperature as a number, or in the labels' shape {list(labels.shape)}, got "
            f"{list(temperature.shape)}; for one temperature per sequence pass "
            "temperature.view(-1, 1).expand_as(labels)"
        )
    if temperature.device != labels.device:
        raise ValueError(
            f"expected temperature on the labels' device {labels.device}, got "
            f"{temperature.device}; move it there"
        )


def of_tokens(temperature: object) -> bool:
    """Whether the kernels read it row by row: one per token, or 0-d on an accelerator, where
    reading it would synchronise with the host."""
    if not isinstance(temperature, Tensor):
        return False
    return temperature.dim() > 0 or temperature.device.type != "cpu"


def logit_scale(temperature: float | Tensor | None) -> float | Tensor:
    """The logit_scale that has the same effect as a temperature for all tokens. It is 1 for other
    temperatures, and for one that `check` refuses."""
    if temperature is None or of_tokens(temperature):
        return 1.0
    if isinstance(temperature, Tensor) and torch.compiler.is_compiling():
        return temperature.double().reciprocal()
    number = float(temperature) if isinstance(temperature, Real | Tensor) else 1.0
    return 1.0 / number if LEAST <= number <= MOST else 1.0


def read(math: RowMath) -> RowMath:
    """math.read(). A compiled call has not checked a 0-d temperature yet; its reciprocal is
    math.logit_scale."""
    if isinstance(math.logit_scale, Tensor):
        scale = float(math.logit_scale)
        temperature = 1 / scale if scale else float("inf")
        expect(LEAST <= temperature <= MOST, EXPECTED, temperature)
    return math.read()


def of_rows(temperature: object, labels: Tensor, shift: bool) -> Tensor | None:
    """`[N]` fp32: the temperature of each row's label. None if one serves all tokens."""
    if not isinstance(temperature, Tensor) or not of_tokens(temperature):
        return None
    rows = temperature.detach().float().expand(labels.shape)
    return (rows.roll(-1, -1) if shift else rows).reshape(-1)


def reciprocal(rows: Tensor) -> Tensor:
    """1 / temperature of each row; NaN for a wrong temperature, which makes the row's results
    NaN."""
    return torch.where((rows >= LEAST) & (rows <= MOST), rows.reciprocal(), torch.nan)


def check_values(rows: Tensor, weight: Tensor, labels: Tensor, shift: bool) -> None:
    """Raise ValueError naming the first scored token with a wrong temperature."""
    wrong = reciprocal(rows).isnan() & (weight != 0)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        at = [row] if labels.dim() == 1 else list(divmod(row, labels.shape[-1]))
        at[-1] += shift
        raise ValueError(
            f"expected {EXPECTED}, got {rows[row].item()} at temperature{at}; mask that token, or "
            "give it the temperature that its logits are divided by"
        )

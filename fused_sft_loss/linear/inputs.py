"""Errors for hidden states and weights of wrong shapes, dtypes and devices."""

from torch import Tensor

from .. import checks


def check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: str,
    ranks: int,
) -> None:
    """Raise TypeError or ValueError unless `linear_sft_loss` takes these tensors.

    ranks: that hold a part of the sequence each.
    """
    checks.are_tensors(hidden=hidden, weight=weight, labels=labels, loss_mask=loss_mask)
    if bias is not None:
        checks.are_tensors(bias=bias)
    checks.targets(labels, loss_mask, cu_seqlens)
    for name, value in (("weight", weight), ("bias", bias), ("labels", labels)):
        if value is not None and value.device != hidden.device:
            raise ValueError(
                f"expected {name} on the device of hidden, {hidden.device}, got {value.device}; "
                "move it there"
            )
    _products(hidden, weight, bias)
    rows = _rows(hidden, layout, ranks)
    if list(labels.shape) != rows:
        hint = ""
        if hidden.dim() == 3 and list(labels.shape) == rows[::-1]:
            other = '; for [s, b, h] hidden states pass layout="sbv"'
            hint = other if layout == "bsv" else '; drop layout="sbv"'
        parts = f", of which {ranks} ranks hold a part each" if ranks > 1 else ""
        raise ValueError(
            f"expected labels {rows} for hidden states {list(hidden.shape)} (layout {layout!r})"
            f"{parts}, got {list(labels.shape)}{hint}"
        )


def check_bool(**flags: bool) -> None:
    """Raise TypeError unless each is a bool."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"expected {name} to be a bool, got {type(value).__name__} {value!r}")


def _products(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless hidden @ weight.T + bias can be computed."""
    if hidden.dtype not in checks.DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in checks.DTYPES)
        raise TypeError(f"expected hidden in {names}, got {hidden.dtype}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(
                f"expected {name} in the dtype of hidden, {hidden.dtype}, got {value.dtype}; "
                "convert one of them, or call the loss under torch.autocast"
            )
    if hidden.dim() not in (2, 3) or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "expected hidden [b, s, h] (or [n, h]) and weight [v, h] with one h, got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(f"expected a weight [v, h] without a 0, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"expected bias [{weight.shape[0]}] for weight {list(weight.shape)}, got "
            f"{list(bias.shape)}"
        )
    for name, value in (("hidden", hidden), ("weight", weight)):
        if value.shape[-1] > 1 and value.stride(-1) != 1:
            raise ValueError(
                f"expected {name} with a last stride of 1, got strides {list(value.stride())} for "
                f"shape {list(value.shape)}; pass {name}.contiguous()"
            )


def _rows(hidden: Tensor, layout: str, ranks: int) -> list[int]:
    """The labels' shape."""
    rows = list(hidden.shape[:-1])
    if len(rows) == 1:
        return [rows[0] * ranks]
    if layout == "sbv":
        rows.reverse()
    return [rows[0], rows[1] * ranks]

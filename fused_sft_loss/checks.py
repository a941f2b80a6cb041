"""Wrong use: what was expected, what came, and the fix. Shapes and dtypes only, never values."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(
    logits: Tensor, labels: Tensor, loss_mask: Tensor | None, cu_seqlens: Tensor | None, layout: str
) -> None:
    """Raise TypeError or ValueError unless the tensors fit as ``sft_loss`` says."""
    _are_tensors(logits=logits, labels=labels, loss_mask=loss_mask, cu_seqlens=cu_seqlens)
    _not_losses(logits, labels)
    if logits.dtype not in DTYPES:
        raise TypeError(f"expected logits in {_names(DTYPES)}, got {logits.dtype}")
    if labels.dtype.is_floating_point or labels.dtype in (
        torch.bool,
        torch.complex64,
        torch.complex128,
    ):
        raise TypeError(f"expected labels of an integer dtype, got {labels.dtype}")
    if logits.dim() not in (2, 3):
        raise ValueError(
            f"expected logits [b, s, v], or [n, v] with labels [n], got shape {list(logits.shape)}"
        )
    _columns(logits)
    rows = list(logits.shape[:-1])
    if layout == "sbv":
        rows.reverse()
    if list(labels.shape) != rows:
        hint = ""
        if rows[::-1] == list(labels.shape):
            hint = (
                '; for [s, b, v] logits pass layout="sbv"'
                if layout == "bsv"
                else '; drop layout="sbv"'
            )
        raise ValueError(
            f"expected labels {rows} for logits {list(logits.shape)} (layout {layout!r}), "
            f"got {list(labels.shape)}{hint}"
        )
    if loss_mask is not None and loss_mask.shape != labels.shape:
        raise ValueError(
            f"expected loss_mask of the labels' shape {list(labels.shape)}, got "
            f"{list(loss_mask.shape)}"
        )
    _boundaries(cu_seqlens)
    _one_device(logits, labels=labels, loss_mask=loss_mask, cu_seqlens=cu_seqlens)


def constant_mask(loss_mask: Tensor | None) -> None:
    """Raise ValueError for a mask that wants a gradient, which the loss does not compute."""
    if loss_mask is not None and loss_mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "expected loss_mask without requires_grad, got one that wants a gradient, which the "
            "loss does not compute. Pass loss_mask.detach(), or weigh the losses yourself: with "
            'losses of reduction="none", (losses * weights).sum() / weights.sum()'
        )


def _are_tensors(**named: Tensor | None) -> None:
    for name, value in named.items():
        optional = name in ("loss_mask", "cu_seqlens")
        if not isinstance(value, Tensor) and not (optional and value is None):
            raise TypeError(f"expected {name} to be a torch.Tensor, got {type(value).__name__}")


def _not_losses(logits: Tensor, labels: Tensor) -> None:
    """The mistake this package was started by: per-token losses in place of logits."""
    transposed = logits.dim() == 2 and logits.shape == labels.shape[::-1]
    if logits.shape == labels.shape or (labels.dim() == 2 and transposed) or logits.dim() == 0:
        raise ValueError(
            f"expected logits [b, s, v], got {list(logits.shape)}, which is the shape of "
            f"per-token losses for labels {list(labels.shape)}. The model was called with labels "
            "and computed its own loss: call it without (model(tokens, position_ids, "
            "attention_mask)) so that it returns logits"
        )


def _columns(logits: Tensor) -> None:
    if logits.shape[-1] == 0:
        raise ValueError(
            f"expected at least one vocabulary column, got logits {list(logits.shape)}"
        )
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"expected logits with a vocabulary stride of 1, got strides {list(logits.stride())} "
            f"for shape {list(logits.shape)}; any strides of the other dimensions are fine. Pass "
            "logits.contiguous()"
        )


def _boundaries(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        return
    if (
        cu_seqlens.dim() != 1
        or cu_seqlens.numel() < 2
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            "expected cu_seqlens [k+1] int32 or int64 with k >= 1 documents, got "
            f"{list(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )


def _one_device(logits: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(
                f"expected {name} on the logits' device {logits.device}, got {tensor.device}"
            )


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

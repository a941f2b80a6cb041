"""Errors for tensors of wrong shapes, dtypes and devices. Values are never read."""

from collections.abc import Iterable

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Few of PyTorch's operators take these, so they are converted to int64.
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, *UNSIGNED)
INTEGER_MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MASKS = (*INTEGER_MASKS, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensors(
    logits: Tensor, labels: Tensor, loss_mask: Tensor | None, cu_seqlens: Tensor | None, layout: str
) -> None:
    """Raise TypeError or ValueError unless ``sft_loss`` takes these tensors."""
    are_tensors(logits=logits, labels=labels, loss_mask=loss_mask, cu_seqlens=cu_seqlens)
    _not_soft(labels)
    _not_losses(logits, labels)
    if logits.dtype not in DTYPES:
        raise TypeError(f"expected logits in {_names(DTYPES)}, got {logits.dtype}")
    _integers(labels)
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
    _targets(labels, loss_mask, cu_seqlens)
    _one_device(logits, labels=labels)


def targets(labels: Tensor, loss_mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Raise TypeError or ValueError unless ``shift_targets`` takes these tensors."""
    are_tensors(labels=labels, loss_mask=loss_mask, cu_seqlens=cu_seqlens)
    _integers(labels)
    _targets(labels, loss_mask, cu_seqlens)


def _targets(labels: Tensor, loss_mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Raise TypeError or ValueError unless mask and boundaries fit integer labels."""
    if labels.dim() not in (1, 2):
        raise ValueError(f"expected labels [b, s] or [n], got shape {list(labels.shape)}")
    if loss_mask is not None:
        if loss_mask.dtype not in MASKS:
            raise TypeError(
                f"expected loss_mask in {_names(MASKS)}, got {loss_mask.dtype}; convert it, for "
                "example with (loss_mask != 0) if it only selects"
            )
        if loss_mask.shape != labels.shape:
            raise ValueError(
                f"expected loss_mask of the labels' shape {list(labels.shape)}, got "
                f"{list(loss_mask.shape)}"
            )
    _boundaries(cu_seqlens)
    _one_device(labels, "labels", loss_mask=loss_mask, cu_seqlens=cu_seqlens)


def constant_mask(loss_mask: Tensor | None) -> None:
    """Raise ValueError for a mask that requires a gradient: the loss computes none."""
    if loss_mask is not None and loss_mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "expected loss_mask without requires_grad, got one that wants a gradient, which the "
            "loss does not compute. Pass loss_mask.detach(), or weigh the losses yourself: use "
            'reduction="none" and (losses * weights).sum() / weights.sum()'
        )


def are_tensors(**named: Tensor | None) -> None:
    for name, value in named.items():
        if value is None and name in ("loss_mask", "cu_seqlens"):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"expected {name} to be a torch.Tensor, got {type(value).__name__}")
        if hasattr(value, "to_local"):
            raise TypeError(
                f"expected {name} to be a plain tensor, got a {type(value).__name__}; pass "
                f"{name}.to_local(), and for logits sharded over the vocabulary tp_group=mesh"
            )
        if value.layout != torch.strided or value.is_nested:
            raise TypeError(
                f"expected {name} to be a dense tensor, got one of layout {value.layout}"
                f"{' (nested)' if value.is_nested else ''}; pass {_dense(value, name)}"
            )


def _dense(value: Tensor, name: str) -> str:
    return f"{name}.to_padded_tensor(...)" if value.is_nested else f"{name}.to_dense()"


def _integers(labels: Tensor) -> None:
    if labels.dtype not in LABELS:
        raise TypeError(f"expected labels of an integer dtype, got {labels.dtype}")


def _not_soft(labels: Tensor) -> None:
    if labels.is_floating_point() and labels.dim() == 3:
        raise TypeError(
            f"expected labels [b, s] of token ids, got {labels.dtype} {list(labels.shape)}: soft "
            "labels (a probability for every id) are not supported; pass argmax(-1), or use "
            "torch.nn.functional.cross_entropy"
        )


def _not_losses(logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError for per-token losses, or for their mean, in place of logits."""
    transposed = logits.dim() == 2 and logits.shape == labels.shape[::-1]
    if logits.dim() == 0:
        got = "a scalar, which is a loss already"
    elif logits.shape == labels.shape or (labels.dim() == 2 and transposed):
        got = (
            f"{list(logits.shape)}, which is the shape of per-token losses for labels "
            f"{list(labels.shape)}"
        )
    else:
        return
    raise ValueError(
        f"expected logits [b, s, v], got {got}. The model was called with labels and computed its "
        "own loss: call it without (model(tokens, position_ids, attention_mask)) so that it "
        "returns logits"
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
        row = cu_seqlens.dim() == 2 and cu_seqlens.shape[0] == 1
        raise ValueError(
            "expected cu_seqlens [k+1] int32 or int64 with k >= 1 documents, got "
            f"{list(cu_seqlens.shape)} {cu_seqlens.dtype}{'; pass cu_seqlens[0]' if row else ''}"
        )


def _one_device(tensor: Tensor, name: str = "logits", **others: Tensor | None) -> None:
    for other, value in others.items():
        if value is not None and value.device != tensor.device:
            raise ValueError(
                f"expected {other} on the {name}' device {tensor.device}, got {value.device}; "
                "move it there"
            )


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

"""Shifted labels and mask for packed sequences: several documents in one row of tokens."""

import torch
from torch import Tensor

from ..scoring import may_synchronise
from ..targets import IGNORE_INDEX, boundaries, check_values, shift_targets
from .protocols import PackedSeqParams


def shift_packed_targets(
    labels: Tensor,
    loss_mask: Tensor | None = None,
    *,
    packed_seq_params: PackedSeqParams | None = None,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:
    """`fused_sft_loss.shift_targets` for packed documents.

    Pass the documents in one of three ways: packed_seq_params, cu_seqlens or position_ids. No
    prediction crosses a boundary. Padding between documents and positions outside them are not
    scored. With context parallelism: call this first, then `get_batch_on_this_cp_rank`, then the
    loss with `shift=False`; a document may begin at a cut or lie across one. Shapes do not change,
    and the host reads no values (on a CPU it checks the boundaries).

    Args:
        labels: [b, s] integer token ids of whole sequences, not shifted.
        loss_mask: [b, s], which label tokens count. None: all.
        packed_seq_params: Megatron's PackedSeqParams over the b*s positions. Document i has
            `cu_seqlens_q[i+1] - cu_seqlens_q[i]` positions and starts at `cu_seqlens_q_padded[i]`,
            or at `cu_seqlens_q[i]` if cu_seqlens_q_padded is None. (From 0.19 on pretrain_gpt.py
            passes the padded boundaries as both; then only loss_mask can exclude the padding.)
        cu_seqlens: [k+1] or [1, k+1] int32 or int64 boundaries, in place of packed_seq_params. They
            end before a tail of -1 or 0; so do those of packed_seq_params.
        position_ids: [b, s] integers. A document continues where the next position is one higher.
            Padding inside a sequence must restart the positions or be masked.
        ignore_index: the label of positions where nothing is predicted.

    Returns:
        (labels, loss_mask): new tensors of the same shapes and dtypes. A mask of None becomes bool.

    Raises:
        ValueError: packed_seq_params and cu_seqlens are both given; shapes do not fit; on a CPU,
            and with FUSED_SFT_LOSS_CHECK=1, boundaries decrease or lie outside the positions.
    """
    if packed_seq_params is not None and cu_seqlens is not None:
        raise ValueError("expected packed_seq_params or cu_seqlens, got both: leave one out")
    for name, tensor in (("loss_mask", loss_mask), ("position_ids", position_ids)):
        if tensor is not None and tensor.shape != labels.shape:
            raise ValueError(
                f"expected {name} of the labels' shape {list(labels.shape)}, got "
                f"{list(tensor.shape)}"
            )
    if packed_seq_params is not None:
        cu_seqlens, inside = _documents(packed_seq_params, labels)
        if inside is not None:
            loss_mask = inside if loss_mask is None else loss_mask.masked_fill(~inside, 0)
    if cu_seqlens is not None:
        cu_seqlens = _checked("cu_seqlens", cu_seqlens, labels)
    labels, loss_mask = shift_targets(labels, loss_mask, cu_seqlens, ignore_index=ignore_index)
    if position_ids is not None:
        has_next = torch.zeros_like(labels, dtype=torch.bool)
        has_next[..., :-1] = position_ids[..., 1:] == position_ids[..., :-1] + 1
        labels = torch.where(has_next, labels, ignore_index)
        loss_mask = torch.where(has_next, loss_mask, torch.zeros_like(loss_mask))
    return labels, loss_mask


def one_row(name: str, bounds: Tensor) -> Tensor:
    """Boundaries [k+1] of [k+1] or [1, k+1], as Megatron's datasets hold them."""
    if bounds.dim() == 2 and bounds.shape[0] == 1:
        return bounds[0]
    if bounds.dim() != 1:
        raise ValueError(
            f"expected {name} [k+1] or [1, k+1], got {list(bounds.shape)}; pass one list of "
            "boundaries over all b*s positions"
        )
    return bounds


def document_bounds(packed_seq_params: PackedSeqParams, labels: Tensor) -> Tensor:
    """Boundaries of documents over the b*s positions; padding between them is one of its own."""
    return one_row("packed_seq_params", _documents(packed_seq_params, labels)[0])


def _checked(name: str, bounds: Tensor, labels: Tensor) -> Tensor:
    """Boundaries [k+1]. Values that are none raise ValueError where the host may read them."""
    bounds = one_row(name, bounds)
    if may_synchronise(labels):
        check_values(None, bounds, labels.numel())
    return bounds


def _documents(packed_seq_params: PackedSeqParams, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """(boundaries [n], bool in the labels' shape: the position lies in a document).

    The second is None without padded boundaries, because then there is no padding to exclude.
    """
    bounds = packed_seq_params.cu_seqlens_q
    padded = packed_seq_params.cu_seqlens_q_padded
    if not isinstance(bounds, Tensor):
        raise ValueError(
            "packed_seq_params: expected cu_seqlens_q [k+1], got "
            f"{type(bounds).__name__}: the loss needs the document boundaries"
        )
    if padded is None:
        return bounds, None
    bounds = _checked("cu_seqlens_q", bounds, labels)
    padded = _checked("cu_seqlens_q_padded", padded, labels)
    if bounds.shape != padded.shape:
        raise ValueError(
            "packed_seq_params: expected cu_seqlens_q and cu_seqlens_q_padded of one length, got "
            f"{list(bounds.shape)} and {list(padded.shape)}"
        )
    bounds, padded = boundaries(bounds), boundaries(padded)  # a tail of -1 would be a document
    ends = padded[:-1] + (bounds[1:] - bounds[:-1])
    both = torch.stack([padded[:-1], ends], -1).flatten()  # document, padding, document, ...
    position = torch.arange(labels.numel(), dtype=torch.int64, device=both.device)
    inside = torch.searchsorted(both.long(), position, right=True) % 2 == 1
    return both, inside.view(labels.shape)

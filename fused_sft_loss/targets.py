"""What a row is scored on: shift, packing, ignore_index and mask, decided here alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks

#: `target` of a row that is not scored, and of one whose label is not a vocabulary id (its loss is
#: NaN).
NOT_SCORED = -1
OUT_OF_VOCABULARY = -2


class Targets(NamedTuple):
    """What each of the N = b*s rows (batch-major) is scored on."""

    target: Tensor  # [N] int64: global vocabulary id, NOT_SCORED or OUT_OF_VOCABULARY
    weight: Tensor  # [N] fp32: 0 where not scored
    count: Tensor  # 0-d int32: rows with weight != 0
    weight_sum: Tensor  # 0-d fp32

    @classmethod
    def empty(cls, labels: Tensor) -> "Targets":
        """Uninitialised, for as many rows as there are labels, on their device."""
        rows = labels.numel()
        return cls(
            labels.new_empty(rows, dtype=torch.int64),
            labels.new_empty(rows, dtype=torch.float32),
            labels.new_empty((), dtype=torch.int32),
            labels.new_empty((), dtype=torch.float32),
        )


def row_targets(
    labels: Tensor,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    vocab_size: int,
) -> Targets:
    """Turn labels and mask `[b, s]` into per-row targets; plain torch, no host synchronisation.

    Row (b, t) is scored on `labels[b, t + shift]` with weight `loss_mask[b, t + shift]` in fp32. It
    is not scored when that position does not exist or lies in another document of `cu_seqlens`,
    when the label is `ignore_index`, or when the weight is 0.
    """
    if shift:
        labels, loss_mask = shift_targets(labels, loss_mask, cu_seqlens, ignore_index=ignore_index)
    labels = labels.long()
    scored = labels != ignore_index
    weight = torch.ones_like(labels, dtype=torch.float32)
    if loss_mask is not None:
        weight = loss_mask.float()
        scored = scored & (weight != 0)
    in_vocabulary = (labels >= 0) & (labels < vocab_size)
    target = torch.where(in_vocabulary, labels, OUT_OF_VOCABULARY)
    target = torch.where(scored, target, NOT_SCORED).flatten()
    weight = torch.where(scored, weight, 0.0).flatten()
    return Targets(target, weight, scored.sum(dtype=torch.int32), weight.sum())


def shift_targets(
    labels: Tensor,
    loss_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Shift labels and mask to the left by one, so that position t holds the label of row t.

    Use it with context parallelism: shift the whole sequence first, slice it after, and call the
    loss with ``shift=False``. Neighbours in a slice are not always neighbours in the sequence.

    Args:
        labels: `[b, s]` (or `[n]`) integer token ids.
        loss_mask: same shape, any dtype. None counts every label.
        cu_seqlens: `[k+1]` increasing document boundaries over the b*s positions. They end where
            they first decrease, so a tail of -1 or 0 is ignored. The last position of a document,
            and every position outside all documents, gets `ignore_index` and mask 0.
        ignore_index: the label of positions without a next token.

    Returns:
        (labels, loss_mask): new tensors of the same shapes and dtypes. A mask of None becomes bool.
        Labels become int64 if their dtype is uint16, uint32 or uint64, or cannot hold
        `ignore_index`.
    """
    checks.targets(labels, loss_mask, cu_seqlens)
    limits = torch.iinfo(labels.dtype)
    if labels.dtype in checks.UNSIGNED or not limits.min <= ignore_index <= limits.max:
        labels = labels.long()
    if loss_mask is None:
        loss_mask = torch.ones_like(labels, dtype=torch.bool)
    has_next = torch.ones_like(labels, dtype=torch.bool)
    has_next[..., -1:] = False
    if cu_seqlens is not None:
        has_next &= same_document_next(cu_seqlens, labels.numel()).view(labels.shape)
    labels = torch.where(has_next, labels.roll(-1, -1), ignore_index)
    loss_mask = torch.where(has_next, loss_mask.roll(-1, -1), torch.zeros_like(loss_mask))
    return labels, loss_mask


def readable(
    labels: Tensor, loss_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The three as every backend reads them alike: no unsigned labels beyond uint8, no weight that
    is 0 in fp32 alone, no sentinels behind the boundaries. Copies only where need be."""
    if labels.dtype in checks.UNSIGNED:
        labels = labels.long()
    if loss_mask is not None and loss_mask.dtype == torch.float64:
        loss_mask = loss_mask.float()
    return labels, loss_mask, None if cu_seqlens is None else boundaries(cu_seqlens)


def boundaries(cu_seqlens: Tensor) -> Tensor:
    """`cu_seqlens` int64, a sentinel tail in it replaced by its last boundary; no synchronisation.

    Buffers of a fixed length end in -1 or 0, as often as needed: the boundaries end where they
    first decrease, for every backend. A repeated boundary ends no further document.
    """
    bounds = cu_seqlens.long()
    ended = (bounds[1:] < bounds[:-1]).cumsum(0) > 0
    bounds = torch.cat([bounds[:1], torch.where(ended, bounds[:1], bounds[1:])])
    return bounds.cummax(0).values


def same_document_next(cu_seqlens: Tensor, positions: int) -> Tensor:
    """`[positions]` bool: p and p+1 lie in one document [cu_seqlens[i], cu_seqlens[i+1])."""
    position = torch.arange(positions, dtype=torch.int64, device=cu_seqlens.device)
    bounds = boundaries(cu_seqlens)
    document = torch.searchsorted(bounds, position, right=True)
    following = torch.searchsorted(bounds, position + 1, right=True)
    return (document == following) & (document > 0) & (document < bounds.numel())


def check_values(loss_mask: Tensor | None, cu_seqlens: Tensor | None, positions: int) -> None:
    """Raise ValueError for a weight that is negative or not finite in fp32, and for boundaries that
    are not boundaries."""
    if loss_mask is not None and loss_mask.dtype != torch.bool and loss_mask.numel():
        weight = loss_mask.float()
        low, high = torch.aminmax(weight)  # both NaN where any is
        if not (low.item() >= 0 and high.item() < torch.inf):
            at = (~((weight >= 0) & (weight < torch.inf))).nonzero()[0].tolist()
            value = loss_mask[tuple(at)].item()
            raise ValueError(f"expected loss_mask >= 0 and finite, got {value} at loss_mask{at}")
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        end = next((i for i in range(1, len(bounds)) if bounds[i] < bounds[i - 1]), len(bounds))
        tail = set(bounds[end:])
        if bounds[0] < 0 or bounds[end - 1] > positions or tail not in (set(), {-1}, {0}):
            raise ValueError(
                f"expected cu_seqlens increasing within [0, {positions}] (b*s positions), with "
                f"nothing but -1 or nothing but 0 after the last boundary, got {bounds}"
            )


def check_labels(target: Tensor, labels: Tensor, shift: bool, vocab_size: int) -> None:
    """Raise ValueError naming the first scored label that is not a vocabulary id."""
    outside = (target == OUT_OF_VOCABULARY).view(labels.shape)
    if outside.any():
        at = outside.nonzero()[0].tolist()
        at[-1] += shift
        raise ValueError(
            f"expected labels in [0, {vocab_size}) or ignore_index, got "
            f"{labels[tuple(at)].item()} at "
            f"labels{at}; mask that position or check the tokenizer against vocab_size"
        )

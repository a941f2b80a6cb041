"""The targets of the rows: shift, packing, ignore_index and mask are decided in this file only."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks

#: The default of every `ignore_index`: a label that is never scored.
IGNORE_INDEX = -100
#: `target` of a row that is not scored.
NOT_SCORED = -1
#: `target` of a row whose label is not a vocabulary id; its loss is NaN.
OUT_OF_VOCABULARY = -2


class Targets(NamedTuple):
    """Target and weight of each of the N = b*s rows (batch-major), and their sums."""

    target: Tensor  # [N] int64: global vocabulary id, NOT_SCORED or OUT_OF_VOCABULARY
    weight: Tensor  # [N] fp32: 0 where not scored
    # 0-d int32: rows with weight != 0. Hides tuple.count, which nobody calls here.
    count: Tensor  # type: ignore[assignment]
    weight_sum: Tensor  # 0-d fp32

    @classmethod
    def empty(cls, labels: Tensor) -> "Targets":
        """Uninitialised targets on the labels' device, one row for each label."""
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

    The target of row (b, t) is `labels[b, t + shift]`, its weight `loss_mask[b, t + shift]` in
    fp32. The row is not scored if that position does not exist or lies in another document of
    `cu_seqlens`, if the label is `ignore_index`, or if the weight is 0.
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


def weighted_mean(total: Tensor, weight_sum: Tensor) -> Tensor:
    """total / weight_sum. If nothing is scored, the result is 0 and has a graph."""
    return total / torch.where(weight_sum > 0, weight_sum, 1.0)


def shift_targets(
    labels: Tensor,
    loss_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
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
    """Convert the three to what every backend reads in the same way; copies only what changes.

    Unsigned labels wider than uint8 become int64. float64 weights become fp32, so that a weight
    that is 0 in fp32 is not scored. Sentinels after the last boundary are replaced.
    """
    if labels.dtype in checks.UNSIGNED:
        labels = labels.long()
    if loss_mask is not None and loss_mask.dtype == torch.float64:
        loss_mask = loss_mask.float()
    return labels, loss_mask, None if cu_seqlens is None else boundaries(cu_seqlens)


def boundaries(cu_seqlens: Tensor) -> Tensor:
    """`cu_seqlens` as int64, with the last boundary in place of sentinels; no synchronisation.

    A buffer of fixed length ends in a run of -1 or 0. For every backend the boundaries end where
    they first decrease. A repeated boundary ends no further document.
    """
    bounds = cu_seqlens.long()
    ended = (bounds[1:] < bounds[:-1]).cumsum(0) > 0
    bounds = torch.cat([bounds[:1], torch.where(ended, bounds[:1], bounds[1:])])
    return bounds.cummax(0).values


def same_document_next(cu_seqlens: Tensor, positions: int) -> Tensor:
    """`[positions]` bool: p and p+1 lie in the same [cu_seqlens[i], cu_seqlens[i+1])."""
    position = torch.arange(positions, dtype=torch.int64, device=cu_seqlens.device)
    bounds = boundaries(cu_seqlens)
    document = torch.searchsorted(bounds, position, right=True)
    following = torch.searchsorted(bounds, position + 1, right=True)
    return (document == following) & (document > 0) & (document < bounds.numel())


def check_values(loss_mask: Tensor | None, cu_seqlens: Tensor | None, positions: int) -> None:
    """Raise ValueError for a weight that is negative or not finite in fp32, and for boundaries that
    decrease before a tail of sentinels or lie outside the positions."""
    if loss_mask is not None and loss_mask.dtype != torch.bool and loss_mask.numel():
        weight = loss_mask.float()
        low, high = torch.aminmax(weight)  # both are NaN if any weight is
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
                f"only -1 or only 0 after the last boundary, got {bounds}"
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

"""Plain PyTorch, on any device, tile by tile: what runs where nothing else does.

It reads masked rows (choosing rows would need a host synchronisation on an accelerator) but never
lets them through. Scratch stays under 64 MiB whatever the logits: a tile is 2^20 elements, 4 MiB in
fp32, and at most eight of them are alive at once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..rowmath import RowMath
from ..shards import merge, merge_metrics
from ..targets import row_targets

__all__ = ["merge", "merge_metrics", "row_grad", "row_stats", "row_targets"]

TILE = 2**20


def tiles(logits: Tensor, valid: int) -> Iterator[tuple[tuple, slice]]:
    """Each tile's index within `[b, s, valid]` and its rows (of N). Columns vary fastest."""
    batch, seq, _ = logits.shape
    width = max(1, min(valid, TILE))
    height = max(1, TILE // width)
    for b in range(batch):
        for s in range(0, seq, height):
            end = min(s + height, seq)
            for c in range(0, valid, width):
                yield (
                    (b, slice(s, end), slice(c, min(c + width, valid))),
                    slice(b * seq + s, b * seq + end),
                )


def transform(x: Tensor, math: RowMath) -> tuple[Tensor, Tensor | float]:
    """z and dz/dx of fp32 logits `[rows, columns]`."""
    if not math.softcap:
        return (x if math.logit_scale == 1 else x * math.logit_scale), math.logit_scale
    bent = torch.tanh(x * (math.logit_scale / math.softcap))
    z = torch.where(x.isinf(), x, math.softcap * bent)
    return z, (1 - bent.square_()).mul_(math.logit_scale)


def local_target(target: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column `[rows, 1]` of each target (clamped into range) and whether it is really there."""
    column = (target - first).unsqueeze(-1)
    return column.clamp(0, columns - 1), (column >= 0) & (column < columns) & (
        target >= 0
    ).unsqueeze(-1)


def tile_stats(z: Tensor, target: Tensor, first: int, columns: int) -> Tensor:
    """Statistics `[rows, columns]` of one tile whose first column has global id `first`."""
    maximum = z.amax(-1, keepdim=True)
    shifted = torch.where(maximum == -torch.inf, -torch.inf, z - maximum)
    exponentials = shifted.exp()
    column, here = local_target(target, first, z.shape[-1])
    z_target = torch.where(here, z.gather(-1, column), 0.0)
    parts = [maximum, exponentials.sum(-1, keepdim=True), z_target]
    if columns > 3:
        parts.append(z.sum(-1, keepdim=True))
    if columns > 4:
        parts.append((z.argmax(-1, keepdim=True) + first).float())
        weighted = torch.where(exponentials == 0, 0.0, shifted.mul_(exponentials))
        parts.append(weighted.sum(-1, keepdim=True))
    return torch.cat(parts, -1)


def merge_tiles(left: Tensor, right: Tensor) -> Tensor:
    """Statistics of two neighbouring column ranges of the same rows, `[rows, columns]` each."""
    both = torch.stack([left, right])
    maximum = both[..., 0].amax(0)
    delta = torch.where(both[..., 0] == -torch.inf, -torch.inf, both[..., 0] - maximum)
    shrink = delta.exp()
    merged = both.sum(0)
    merged[:, 0] = maximum
    merged[:, 1] = (both[..., 1] * shrink).sum(0)
    if merged.shape[-1] > 4:
        merged[:, 4] = torch.where(right[:, 0] > left[:, 0], right[:, 4], left[:, 4])
        moved = both[..., 5] + torch.where(shrink == 0, 0.0, delta) * both[..., 1]
        merged[:, 5] = (moved * shrink).sum(0)
    return merged


def empty_stats(rows: int, columns: int, like: Tensor) -> Tensor:
    """What a range without columns amounts to: maximum -inf, every sum 0."""
    stats = torch.zeros(rows, columns, dtype=torch.float32, device=like.device)
    stats[:, 0] = -torch.inf
    return stats


def row_stats(
    logits: Tensor, target: Tensor, weight: Tensor, math: RowMath, columns: int
) -> Tensor:
    valid = math.valid_columns(logits.shape[-1])
    stats = empty_stats(weight.numel(), columns, like=logits)
    for index, rows in tiles(logits, valid):
        z, _ = transform(logits[index].float(), math)
        first = math.vocab_start + index[-1].start
        part = tile_stats(z, target[rows], first, columns)
        stats[rows] = part if index[-1].start == 0 else merge_tiles(stats[rows], part)
    return torch.where((weight != 0).unsqueeze(-1), stats, 0.0)


def row_grad(
    logits: Tensor, lse: Tensor, target: Tensor, scale: Tensor, math: RowMath, out: Tensor
) -> None:
    valid = math.valid_columns(logits.shape[-1])
    scored = (scale != 0).unsqueeze(-1)
    softmax_factor = (scale * (1 + 2 * math.z_loss * lse)).unsqueeze(-1)
    smoothing = (scale * (math.label_smoothing / math.vocab_size)).unsqueeze(-1)
    target_factor = (scale * (1 - math.label_smoothing)).unsqueeze(-1)
    lse = lse.unsqueeze(-1)
    for index, rows in tiles(logits, valid):
        z, slope = transform(logits[index].float(), math)
        grad = (z - lse[rows]).exp_().mul_(softmax_factor[rows]).sub_(smoothing[rows])
        column, here = local_target(
            target[rows], math.vocab_start + index[-1].start, grad.shape[-1]
        )
        grad.scatter_add_(-1, column, torch.where(here, -target_factor[rows], 0.0))
        grad.mul_(slope)
        out[index].copy_(torch.where(scored[rows], grad, 0.0))
    out[..., valid:].zero_()

"""The backend "eager": plain PyTorch on any device, tile by tile, if no other backend can run.

On a CPU masked rows are never read. On an accelerator they are read, because choosing rows would
need a host synchronisation; then their results are replaced by 0. Scratch memory is a few tiles and
does not grow with the logits: under 64 MiB on a CPU, under 128 MiB on an accelerator.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..rowmath import RowMath
from ..scoring import Scoring
from ..shards import merge, merge_metrics
from ..targets import Targets, weighted_mean
from ..targets import row_targets as targets_of
from .contract import ARGMAX, MAXIMUM, MOMENT, SUM, SUM_EXP, TARGET, EntropyGrad, RowFactor

__all__ = [
    "merge",
    "merge_metrics",
    "reduce",
    "row_grad",
    "row_stats",
    "row_targets",
]

# Most elements of a tile. The fp32 copies of ACCELERATOR_TILE fit into the accelerator's cache, and
# an operation on them takes about as long as the host needs to launch one. Those of CORE_TILE fit
# into the cache of a core.
TILE = 2**20
ACCELERATOR_TILE = 2**22
CORE_TILE = 2**16

Rows = slice | Tensor  # of the N rows
Index = tuple[int, slice] | tuple[Tensor, Tensor]  # sequences and positions, within `[b, s]`


def chooses_rows(tensor: Tensor) -> bool:
    """Whether rows can be chosen by their weights without a synchronisation."""
    return tensor.device.type == "cpu"


def blocks(
    scored: Tensor, batch: int, seq: int, height: int, read: bool = True
) -> Iterator[tuple[Index, Rows]]:
    """Yield blocks of at most `height` rows: the scored rows if `read`, else the rows not scored.

    On an accelerator the host does not know which rows are scored. Then all rows are yielded if
    `read`, from one sequence at a time, and no rows otherwise.
    """
    if not chooses_rows(scored):
        for first in range(0, batch * seq if read else 0, seq or 1):
            for start in range(first, first + seq, height):
                yield neighbours(start, min(start + height, first + seq), seq)
        return
    chosen = (scored == read).nonzero().view(-1)
    for rows in chosen.split(height) if len(chosen) else ():
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows) and first // seq == last // seq:
            yield neighbours(first, last + 1, seq)
        else:
            yield (rows // seq, rows % seq), rows


def neighbours(start: int, stop: int, seq: int) -> tuple[Index, Rows]:
    """Consecutive rows of one sequence as slices, so that their tile is a view."""
    b, s = divmod(start, seq)
    return (b, slice(s, s + stop - start)), slice(start, stop)


def tile_shape(valid: int, device: torch.device) -> tuple[int, int]:
    """The largest (rows, columns) of a tile, for logits with `valid` columns."""
    if device.type == "cpu":
        most, size = TILE, min(TILE, CORE_TILE * torch.get_num_threads())
    else:
        most = size = ACCELERATOR_TILE
    width = max(1, min(valid, most))
    return max(1, size // width), width


def tiles(scored: Tensor, batch: int, seq: int, valid: int) -> Iterator[tuple[tuple, Rows]]:
    """Yield each tile's index in `[b, s, valid]` and its rows (of N). Columns vary fastest."""
    height, width = tile_shape(valid, scored.device)
    for index, rows in blocks(scored, batch, seq, height):
        for c in range(0, valid, width):
            yield (*index, slice(c, min(c + width, valid))), rows


def scratch(valid: int, device: torch.device) -> Tensor:
    """Memory of three fp32 tiles, which all tiles use in turn. On a CPU, new memory for each tile
    would take longer than its arithmetic."""
    height, width = tile_shape(valid, device)
    return torch.empty(3, height * width, dtype=torch.float32, device=device)


def load(tile: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A tile in fp32, and memory for two more tiles. All three lie in `memory`, if given."""
    if memory is None:
        memory = torch.empty(3, tile.numel(), dtype=torch.float32, device=tile.device)
    memory = memory[:, : tile.numel()].view(3, *tile.shape)
    return memory[0].copy_(tile), memory[1:]


def transform(x: Tensor, spare: Tensor, math: RowMath) -> tuple[Tensor, Tensor | None]:
    """(capped x, tanh of the softcap or None) of fp32 logits; overwrites `x` and `spare`.

    z = math.unit * capped x.
    """
    if not math.softcap:
        return x, None
    bent, within = spare
    torch.mul(x, math.logit_scale / math.softcap, out=bent).tanh_()
    numbers = torch.finfo(x.dtype)
    # Do not cap infinities: add x - clamp(x), which is 0 for all finite logits.
    x.sub_(torch.clamp(x, numbers.min, numbers.max, out=within))
    return x.add_(bent, alpha=math.softcap), bent


def chain(grad: Tensor, bent: Tensor | None, scale: float | Tensor) -> Tensor:
    """Turn the gradient of z into the gradient of the logits, in place. Overwrites `bent`."""
    if bent is not None:
        grad.mul_(bent.square_().neg_().add_(1))
    return scaled(grad, scale)


def at_targets(logits: Tensor, target: Tensor, scored: Tensor, math: RowMath) -> tuple:
    """(rows to read, of N; index of their targets in `[b, s, v]`; here).

    `here` tells whether a row is scored and its target is in this shard. If not, the index points
    to some other column.
    """
    _, seq, columns = logits.shape
    rows = torch.arange(len(scored), dtype=torch.int64, device=logits.device)
    if chooses_rows(logits):
        rows = rows[scored]
    target = target[rows]
    column = target - math.vocab_start
    here = (target >= 0) & (column >= 0) & (column < math.valid_columns(columns)) & scored[rows]
    return rows, (rows // seq, rows % seq, column.clamp(0, columns - 1)), here


def scaled(z: Tensor, unit: float | Tensor) -> Tensor:
    """unit * z `[rows, columns]`, in place. `unit` is a number, or `[rows]`."""
    if isinstance(unit, Tensor):
        return z.mul_(unit.unsqueeze(-1))
    return z if unit == 1 else z.mul_(unit)


def of_rows(unit: float | Tensor, rows: Rows) -> float | Tensor:
    """The unit of some of the rows."""
    return unit[rows] if isinstance(unit, Tensor) else unit


def weighted_exponents(u: Tensor, e: Tensor) -> Tensor:
    """u where e = exp(u) is not 0, else 0, in place: a masked-out column (u = -inf) adds nothing
    to an entropy and its gradient."""
    return u.masked_fill_(e == 0, 0.0)


def tile_stats(x: Tensor, first: int, statistics: int, unit: float | Tensor) -> Tensor:
    """Statistics `[rows, statistics]` of one tile, whose first column has the global id `first`.
    TARGET stays 0. Overwrites `x`."""
    maximum = x.amax(-1, keepdim=True)
    sums = [x.sum(-1, keepdim=True)] if statistics > SUM else []
    if statistics > ARGMAX:
        sums.append((x.argmax(-1, keepdim=True) + first).float())
    # If all logits are -inf, subtract the lowest finite number: -inf - -inf would be NaN.
    shifted = scaled(x.sub_(maximum.clamp(min=torch.finfo(x.dtype).min)), unit)
    exponentials = shifted.exp() if statistics > ARGMAX else shifted.exp_()
    denominator = exponentials.sum(-1, keepdim=True)
    if statistics > ARGMAX:
        weighted = weighted_exponents(shifted, exponentials).mul_(exponentials)
        sums.append(weighted.sum(-1, keepdim=True))
    return torch.cat([maximum, denominator, torch.zeros_like(maximum), *sums], -1)


def merge_tiles(left: Tensor, right: Tensor, unit: float | Tensor) -> Tensor:
    """Statistics of two neighbouring column ranges of the same rows, `[rows, statistics]` each."""
    both = torch.stack([left, right])
    maximum = both[..., MAXIMUM].amax(0)
    delta = (both[..., MAXIMUM] - maximum) * unit
    delta = torch.where(both[..., MAXIMUM] == -torch.inf, -torch.inf, delta)
    shrink = delta.exp()
    merged = both.sum(0)
    merged[:, MAXIMUM] = maximum
    merged[:, SUM_EXP] = (both[..., SUM_EXP] * shrink).sum(0)
    if merged.shape[-1] > ARGMAX:
        higher = right[:, MAXIMUM] > left[:, MAXIMUM]
        merged[:, ARGMAX] = torch.where(higher, right[:, ARGMAX], left[:, ARGMAX])
        moved = both[..., MOMENT] + torch.where(shrink == 0, 0.0, delta) * both[..., SUM_EXP]
        merged[:, MOMENT] = (moved * shrink).sum(0)
    return merged


def empty_stats(rows: int, statistics: int, like: Tensor) -> Tensor:
    """Statistics of no columns: maximum -inf, every sum 0."""
    stats = torch.zeros(rows, statistics, dtype=torch.float32, device=like.device)
    stats[:, MAXIMUM] = -torch.inf
    return stats


def row_targets(scoring: Scoring, vocab_size: int) -> Targets:
    labels, loss_mask, cu_seqlens, shift, ignore_index, _per_sample = scoring
    return targets_of(labels, loss_mask, cu_seqlens, shift, ignore_index, vocab_size)


def reduce(losses: Tensor, weight_sum: Tensor | None) -> Tensor:
    total = losses.sum()
    return total if weight_sum is None else weighted_mean(total, weight_sum)


def row_stats(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    math: RowMath,
    statistics: int,
    scale: Tensor | None = None,
) -> Tensor:
    unit_of_all = math.unit if scale is None else scale
    batch, seq, width = logits.shape
    valid, scored = math.valid_columns(width), weight != 0
    stats = empty_stats(weight.numel(), statistics, like=logits)
    memory = scratch(valid, logits.device)
    for index, rows in tiles(scored, batch, seq, valid):
        x, _ = transform(*load(logits[index], memory), math)
        unit = of_rows(unit_of_all, rows)
        part = tile_stats(x, math.vocab_start + index[-1].start, statistics, unit)
        first = index[-1].start == 0
        stats[rows] = part if first else merge_tiles(stats[rows], part, unit)
    rows, targets, here = at_targets(logits, target, scored, math)
    x, _ = transform(*load(logits[targets]), math)
    stats[rows, TARGET] = torch.where(here, x, 0.0)
    return torch.where(scored.unsqueeze(-1), stats, 0.0)


def tilts(entropy: EntropyGrad, weight: Tensor | None, total: Tensor) -> tuple[Tensor, Tensor]:
    """(-upstream gradient of each row's entropy `[N]`, 0 where the weight is 0; sum of p*u `[N,
    1]`), from the sums of exp(u) `[N, 1]`."""
    tilt = -entropy.grad.float()
    if weight is not None:
        tilt = torch.where(weight != 0, tilt, 0.0)
    return tilt, total.log() - entropy.entropy.unsqueeze(-1)


def row_grad(
    logits: Tensor,
    normalizer: Tensor,
    target: Tensor,
    factor: RowFactor,
    math: RowMath,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    entropy: EntropyGrad | None = None,
) -> None:
    unit = math.unit if scale is None else scale
    outer = math.logit_scale if scale is None else scale
    batch, seq, width = logits.shape
    factors = factor.values()
    valid, scored = math.valid_columns(width), factors != 0
    maximum, total = normalizer.unsqueeze(1).unbind(-1)
    softmax_factor = factors.unsqueeze(-1) / total
    if entropy is not None:
        tilt, mean = tilts(entropy, factor.weight, total)
        scored = scored | (tilt != 0)
        tilt = tilt.unsqueeze(-1) / total
        softmax_factor -= tilt * mean
    if math.z_loss:
        softmax_factor *= 1 + 2 * math.z_loss * (maximum * math.unit + total.log())
    smoothing = (factors * (math.label_smoothing / math.vocab_size)).unsqueeze(-1)

    def softmax_part(x: Tensor, rows: Rows) -> Tensor:
        u = scaled(x.sub_(maximum[rows]), of_rows(unit, rows))
        if entropy is not None:
            p = u.exp()
            return weighted_exponents(u, p).mul_(tilt[rows]).add_(softmax_factor[rows]).mul_(p)
        grad = u.exp_().mul_(softmax_factor[rows])
        return grad.sub_(smoothing[rows]) if math.label_smoothing else grad

    # Read the targets before `out` is written: it may be the logits.
    rows, targets, here = at_targets(logits, target, scored, math)
    x, bent = transform(*load(logits[targets].unsqueeze(-1)), math)
    grad = softmax_part(x, rows).sub_((factors[rows] * (1 - math.label_smoothing)).unsqueeze(-1))
    grad_of_target = chain(grad, bent, of_rows(outer, rows)).squeeze(-1).to(out.dtype)
    memory = scratch(valid, logits.device)
    for index, rows in tiles(scored, batch, seq, valid):
        x, bent = transform(*load(logits[index], memory), math)
        grad = chain(softmax_part(x, rows), bent, of_rows(outer, rows))
        if not chooses_rows(logits):
            grad.masked_fill_(~scored[rows].unsqueeze(-1), 0.0)
        out[index] = grad.to(out.dtype) if isinstance(rows, Tensor) else grad
    for index, _ in blocks(scored, batch, seq, batch * seq, read=False):
        out[index] = 0.0
    out[..., valid:].zero_()
    out[targets] = torch.where(here, grad_of_target, out[targets])

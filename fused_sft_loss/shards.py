"""A vocabulary sharded over ranks: which columns a rank holds, the all-gather of row statistics and
their merge in rank order."""

import torch
import torch.distributed as dist
from torch import Tensor

from . import groups
from .backends.contract import ARGMAX, MAXIMUM, MOMENT, SUM, SUM_EXP, TARGET
from .options import Options
from .rowmath import RowMath
from .targets import OUT_OF_VOCABULARY


def placed(columns: int, options: Options) -> tuple[int, int, str]:
    """(vocab_start, vocab_size, group name or "") of this rank."""
    group = groups.process_group(options.tp_group)
    start, size = options.vocab_start, options.vocab_size
    ranks = 1 if group is None else dist.get_world_size(group)
    if group is None or ranks == 1:
        if start:
            raise ValueError(f"expected vocab_start 0 or None without a tp_group, got {start}")
        if size is not None and size > columns:
            raise ValueError(
                f"expected at least vocab_size={size} columns without a tp_group, got {columns}; "
                "if these logits are one shard of the vocabulary, pass tp_group"
            )
        return 0, columns if size is None else size, ""
    if start is not None:
        if size is None or not 0 <= start:
            raise ValueError(
                "expected vocab_size and vocab_start >= 0 for shards placed by vocab_start (no "
                f"rank sees the others' sizes), got vocab_size={size}, vocab_start={start}"
            )
        return start, size, group.group_name
    size = columns * ranks if size is None else size
    _equal(columns, ranks, size)
    return dist.get_rank(group) * columns, size, group.group_name


def _equal(columns: int, ranks: int, size: int) -> None:
    """Raise ValueError unless equal shards in rank order can hold a vocabulary of `size`.

    The last shards may hold only padding. If the first shard could hold the whole vocabulary, that
    is refused: gathered logits have this shape too, and would get a wrong gradient.
    """
    total = columns * ranks
    if size > total:
        raise ValueError(
            f"expected {ranks} equal shards that add up to vocab_size={size} (the last ones may "
            f"be padding), got {ranks} x {columns} = {total} columns. For uneven shards pass "
            "vocab_start"
        )
    if size <= columns:
        raise ValueError(
            f"expected {ranks} shards of vocab_size={size}, got {columns} columns here, which is "
            "all of it; these look like gathered logits: drop tp_group. If they are shards and all "
            f"but the first hold only padding, pass vocab_start=rank * {columns}"
        )


class Gathering:
    """An all-gather of `[N, k]` fp32 to `[ranks, N, k]`, the same bits on every rank, under way.

    `group_name` is "" for an unsharded vocabulary.
    """

    def __init__(self, stats: Tensor, group_name: str) -> None:
        self._work = None
        if not group_name:
            self._gathered = stats.unsqueeze(0)
            return
        group = groups.by_name(group_name)
        self._gathered = stats.new_empty((group.size(), *stats.shape))
        parts = list(self._gathered.unbind())
        self._work = dist.all_gather(parts, stats, group=group, async_op=True)

    def finished(self) -> Tensor:
        """Wait for it; on an accelerator the stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        return self._gathered


def gather(stats: Tensor, group_name: str) -> Tensor:
    """The result of a :class:`Gathering`."""
    return Gathering(stats, group_name).finished()


def check(held: list[tuple[int, int, int]]) -> None:
    """Raise ValueError unless (start, stop, vocab_size) by rank tile one vocabulary."""
    ordered = sorted((start, stop) for start, stop, _ in held)
    edges = [0] + [stop for _, stop in ordered]
    tiled = all(start == edge for (start, _), edge in zip(ordered, edges, strict=False))
    sizes = {size for _, _, size in held}
    if not tiled or len(sizes) != 1 or edges[-1] < max(sizes):
        raise ValueError(
            "expected the ranks' vocabulary shards to tile [0, vocab_size) without gap or overlap "
            f"and one vocab_size, got (start, stop, vocab_size) by rank: {list(map(tuple, held))}"
        )


def merge_exponentials(gathered: Tensor, unit: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum, sum of exp(unit * (x - maximum)), shift `[ranks, N]`) from `[ranks, N, k]`.

    `unit` is a number, or `[N]`.
    A shard's shift is unit * (its maximum - maximum). A shard or a whole row may be all -inf; its
    shift is then -inf, because -inf - -inf would be NaN.
    """
    maximum = gathered[..., MAXIMUM].amax(0)
    shift = (gathered[..., MAXIMUM] - maximum) * unit
    shift = torch.where(gathered[..., MAXIMUM] == -torch.inf, -torch.inf, shift)
    return maximum, _ordered_sum(gathered[..., SUM_EXP] * shift.exp()), shift


def fold(parts: Tensor, unit: float) -> Tensor:
    """`[N, k]`: the statistics of neighbouring column ranges `[parts, N, k]` as those of one."""
    maximum, sum_exp, shift = merge_exponentials(parts, unit)
    folded = parts.sum(0)
    folded[..., MAXIMUM], folded[..., SUM_EXP] = maximum, sum_exp
    if parts.shape[-1] > ARGMAX:
        folded[..., ARGMAX] = _argmax(parts, maximum)
        folded[..., MOMENT] = _moment(parts, shift)
    return folded


def _argmax(gathered: Tensor, maximum: Tensor) -> Tensor:
    """The smallest id with the maximum, `[N]`: as in torch.argmax, the first one wins."""
    holder = torch.where(gathered[..., MAXIMUM] == maximum, gathered[..., ARGMAX], torch.inf)
    return holder.amin(0)


def _moment(gathered: Tensor, shift: Tensor) -> Tensor:
    """The sum of u * exp(u), `[N]`, with u relative to the maximum of all shards."""
    shrink = shift.exp()
    shift = torch.where(shrink == 0, 0.0, shift)
    return _ordered_sum((gathered[..., MOMENT] + shift * gathered[..., SUM_EXP]) * shrink)


def merge(
    gathered: Tensor, target: Tensor, weight: Tensor, math: RowMath, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(weight * loss `[N]`, normalizer `[N, 2]`), fp32, from the shards' statistics `[ranks, N,
    k]`.

    The normalizer is two numbers: the row's maximum x and its sum of exp(unit * (x - maximum)).
    Their log-sum-exp as one fp32 number would be off by half a unit in its last place, and every
    probability by exp of that error: from |z| = 1e8 on, probabilities would have no correct digit.

    Loss and normalizer are exactly 0 in rows with weight 0, whatever their statistics. A label
    outside the vocabulary makes both NaN. `scale`: see :class:`.contract.Backend`.
    """
    unit = math.unit if scale is None else scale
    maximum, denominator, _ = merge_exponentials(gathered, unit)
    log_denominator = denominator.log()
    # (maximum - x_y) first: both are logits, so the difference is exact if they are close.
    loss = (maximum - _ordered_sum(gathered[..., TARGET])) * unit + log_denominator
    if math.label_smoothing:
        mean = _ordered_sum(gathered[..., SUM]) / math.vocab_size
        smooth = (maximum - mean) * unit + log_denominator
        loss = (1 - math.label_smoothing) * loss + math.label_smoothing * smooth
    if math.z_loss:
        loss = loss + math.z_loss * (maximum * unit + log_denominator).square()
    poisoned, scored = target == OUT_OF_VOCABULARY, weight != 0
    loss = torch.where(scored, (weight * loss).masked_fill(poisoned, torch.nan), 0.0)
    normalizer = torch.stack([maximum, denominator], -1)
    normalizer = normalizer.masked_fill(poisoned.unsqueeze(-1), torch.nan)
    return loss, torch.where(scored.unsqueeze(-1), normalizer, 0.0)


def merge_metrics(
    gathered: Tensor, target: Tensor, weight: Tensor, math: RowMath, scale: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(loss, log_prob, lse, correct, entropy) `[N]`; 0 or False where weight is 0. The loss is
    unweighted.

    entropy = lse - sum of p*z; with u = z - max z that is log(denominator) - sum(u * e^u) /
    denominator.
    """
    scored, unit = weight != 0, math.unit if scale is None else scale
    loss, _ = merge(gathered, target, scored.float(), math, scale)
    maximum, denominator, shift = merge_exponentials(gathered, unit)
    log_denominator = denominator.log()
    entropy = log_denominator - _moment(gathered, shift) / denominator
    lse = maximum * unit + log_denominator
    log_prob = (_ordered_sum(gathered[..., TARGET]) - maximum) * unit - log_denominator
    correct = scored & (_argmax(gathered, maximum) == target)
    poisoned = target == OUT_OF_VOCABULARY
    lse, log_prob, entropy = (
        torch.where(scored, figure.masked_fill(poisoned, torch.nan), 0.0)
        for figure in (lse, log_prob, entropy)
    )
    return loss, log_prob, lse, correct, entropy


def _ordered_sum(per_rank: Tensor) -> Tensor:
    """Sum over dim 0 in rank order; a library reduction may use another order on each rank."""
    total = per_rank[0]
    for part in per_rank[1:]:
        total = total + part
    return total

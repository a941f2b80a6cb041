"""Ranks that share a vocabulary agree on the call, or all of them raise.

The loss waits for the other ranks in one all-gather. A rank that raised before it, or that comes
with another shape, would leave the others waiting, and other labels would give a wrong number.
Therefore each rank first tells what it is called with, or its error: one more small exchange, where
reading values costs no synchronisation (on a CPU; elsewhere under FUSED_SFT_LOSS_CHECK=1).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from . import flags, groups, shards
from .rowmath import RowMath
from .scoring import Scoring
from .targets import Targets

#: Facts about a batch. The inputs count only where what the rows are scored on differs: a label
#: under the mask may be anything.
ROWS = "what the rows are scored on"
INPUTS = ("labels", "loss_mask", "cu_seqlens")
SHARD = "vocabulary shard"


def agreed_targets(
    find: Callable[[], Targets],
    scoring: Scoring,
    logits: Tensor,
    math: RowMath,
    call: str,
    group_name: str,
) -> Targets:
    """`find()`, of a call on which all ranks of the group agree."""

    def facts(found: Targets) -> dict:
        options = math._asdict()
        start, size = options.pop("vocab_start"), options.pop("vocab_size")
        return {
            "call": call,
            "logits": str(logits.dtype),
            "labels' shape": list(scoring.labels.shape),
            "shift": scoring.shift,
            "ignore_index": scoring.ignore_index,
            **options,
            SHARD: (start, start + logits.shape[-1], size),
            ROWS: [fingerprint(tensor) for tensor in found[:2]],
            **{name: fingerprint(getattr(scoring, name)) for name in INPUTS},
        }

    return agreed(find, _resolve_process_group(group_name), facts, scoring.labels)


def agreed(check: Callable, group, facts: Callable, tensor: Any = None):
    """`check()`, unless it raises on any rank of the group: then every rank raises.

    facts: `facts(result) -> dict`: what has to be the same on all ranks, with SHARD as
    :func:`.shards.check` takes it. tensor: see :func:`wanted`; without the exchange this is
    `check()` alone.
    """
    if not wanted(group, tensor):
        return check()
    try:
        result = check()
        mine = facts(result)
    except Exception as error:  # whatever it is, the others must hear of it
        _exchange(group, str(error), None)
        raise
    _compare(group, _exchange(group, None, mine))
    return result


def tell(error: Exception, tp_group: Any, tensor: Any) -> None:
    """Let the ranks that are in :func:`agreed` know that this one raises `error`.

    Not while torch.compile traces: a collective in a trace runs later, or never.
    """
    if torch.compiler.is_compiling():
        return
    try:
        group = groups.process_group(tp_group)
    except (TypeError, ValueError):
        return  # there is nobody to tell
    if wanted(group, tensor):
        _exchange(group, str(error), None)


def wanted(group, tensor: Any = None) -> bool:
    """Whether the ranks of a group talk before they compute: if there are several and it costs no
    synchronisation, or FUSED_SFT_LOSS_CHECK=1 asks for it.

    tensor: of the call, for its device; where it is none, torch is asked for a GPU.
    """
    if isinstance(tensor, Tensor):
        on_cpu = tensor.device.type == "cpu"
    else:
        on_cpu = not torch.cuda.is_available()
    return group is not None and group.size() > 1 and (flags.enabled(flags.CHECK) or on_cpu)


class Fingerprint(NamedTuple):
    """A tensor's shape, and a number that depends on every value and its place."""

    shape: tuple[int, ...]
    number: int


def fingerprint(tensor: Tensor | None) -> Fingerprint | None:
    """In integers, which wrap: the same whatever the order of the sum. A bool or float counts as
    fp32."""
    if tensor is None:
        return None
    values = tensor.detach().reshape(-1)
    if values.dtype == torch.bool or values.is_floating_point():
        values = values.float().view(torch.int32)
    place = torch.arange(values.numel(), dtype=torch.int64, device=values.device)
    mixed = values.long() + place * -0x61C8864680B583EB  # as the generator splitmix64 does
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return Fingerprint(tuple(tensor.shape), int(mixed.sum()))


def _exchange(group, message: str | None, facts: dict | None) -> dict[int, tuple]:
    """(message, facts) by global rank; the same on every rank."""
    told = [None] * group.size()
    dist.all_gather_object(told, (message, facts), group=group)
    return dict(zip(dist.get_process_group_ranks(group), told, strict=True))


def _compare(group, told: dict[int, tuple]) -> None:
    """Raise ValueError where a rank has raised or the facts differ; the same on every rank that has
    not raised itself."""
    for rank, (message, _) in told.items():
        if message is not None:
            raise ValueError(f"rank {rank}, which shares this vocabulary, stopped: {message}")
    facts = {rank: held for rank, (_, held) in told.items()}
    known = {name: None for held in facts.values() for name in held}
    names = [name for name in known if name != SHARD and _differs(name, facts)]
    if ROWS in known and ROWS not in names:
        names = [name for name in names if name not in INPUTS]
    if names:
        differences = "; ".join(_difference(name, facts) for name in names if name != ROWS)
        raise ValueError(
            f"expected the same call on ranks {list(facts)}, which share the vocabulary, got other "
            f"{differences}. Broadcast the batch over tensor parallelism (in Megatron "
            "get_batch_on_this_tp_rank) and give every rank the same options, or pass the group "
            "that really shards the vocabulary"
        )
    if SHARD in known:
        shards.check([held[SHARD] for held in facts.values()])


def _differs(name: str, facts: dict[int, dict]) -> bool:
    values = [held.get(name) for held in facts.values()]
    return any(value != values[0] for value in values)


def _difference(name: str, facts: dict[int, dict]) -> str:
    """Which ranks hold what."""
    holders: dict[str, list[int]] = {}
    for rank, held in facts.items():
        holders.setdefault(repr(held.get(name)), []).append(rank)
    if any(isinstance(held.get(name), Fingerprint) for held in facts.values()):
        return f"{name} on ranks " + " than on ranks ".join(map(str, reversed(holders.values())))
    return f"{name}: " + ", ".join(f"{value} on ranks {at}" for value, at in holders.items())

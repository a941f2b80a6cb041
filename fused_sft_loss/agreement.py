"""Ranks that share a vocabulary agree on the call, or all of them raise.

The loss waits for the other ranks in one all-gather. If one rank raises before it, or comes with
another shape, the others wait for ever. If it comes with other labels, the loss is wrong. Therefore
the ranks first exchange their arguments or their errors in one more small collective. On a CPU they
always do, because reading values costs no synchronisation there; on a GPU only with
FUSED_SFT_LOSS_CHECK=1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from . import flags, groups, shards
from .rowmath import RowMath
from .scoring import Scoring
from .targets import Targets

Result = TypeVar("Result")

#: Names of facts. A difference in INPUTS is an error only together with one in ROWS: labels of
#: masked tokens may differ.
ROWS = "targets and weights of the rows"
INPUTS = ("labels", "loss_mask", "cu_seqlens")
SHARD = "vocabulary shard"

#: (error message, facts) of a rank; one of the two is None.
Message = tuple[str | None, dict[str, Any] | None]


def agreed_targets(
    find: Callable[[], Targets],
    scoring: Scoring,
    logits: Tensor,
    math: RowMath,
    call: str,
    group_name: str,
    more: Callable[[Targets], dict[str, Any]] = lambda found: {},
) -> Targets:
    """`find()`, of a call on which all ranks of the group agree, if there is one.

    logits: a tensor of their dtype, whose last dimension is this rank's columns. more: `more(found)
    -> dict` of further facts.
    """

    def facts(found: Targets) -> dict[str, Any]:
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
            **more(found),
        }

    if not group_name:
        return find()
    return agreed(find, groups.by_name(group_name), facts, scoring.labels)


def agreed(
    check: Callable[[], Result],
    group: ProcessGroup | None,
    facts: Callable[[Result], dict[str, Any]],
    tensor: object = None,
) -> Result:
    """`check()`, or an error on every rank of the group if it raises on one of them.

    facts: `facts(result) -> dict` of values that must be equal on all ranks; the one under SHARD
    goes to :func:`.shards.check`. tensor: see :func:`wanted`; if it says no, the ranks
    exchange nothing.
    """
    if not wanted(group, tensor):
        return check()
    try:
        result = check()
        mine = facts(result)
    except Exception as error:  # of any kind: the other ranks must be told
        _exchange(group, str(error), None)
        raise
    _compare(_exchange(group, None, mine))
    return result


def tell(error: Exception, tp_group: object, tensor: object) -> None:
    """Tell the ranks that wait in :func:`agreed` that this one raises `error`.

    Does nothing while torch.compile traces: a collective in a trace runs later, or never.
    """
    if torch.compiler.is_compiling():
        return
    try:
        group = groups.process_group(tp_group)
    except (TypeError, ValueError):
        return  # there is no group to tell
    if wanted(group, tensor):
        _exchange(group, str(error), None)


def wanted(group: ProcessGroup | None, tensor: object = None) -> TypeGuard[ProcessGroup]:
    """Whether the ranks of a group compare their calls before they compute: if there are several
    ranks, and it costs no synchronisation or FUSED_SFT_LOSS_CHECK=1 is set.

    tensor: one of the call's tensors, for its device. Without one, the device is a GPU if torch
    finds one.
    """
    if isinstance(tensor, Tensor):
        on_cpu = tensor.device.type == "cpu"
    else:
        on_cpu = not torch.cuda.is_available()
    return group is not None and group.size() > 1 and (flags.enabled(flags.CHECK) or on_cpu)


class Fingerprint(NamedTuple):
    """A tensor's shape, and a hash of its values and their positions."""

    shape: tuple[int, ...]
    number: int


def fingerprint(tensor: Tensor | None) -> Fingerprint | None:
    """Hash in int64, which wraps, so that the sum does not depend on its order.

    Bools and floats are converted to fp32, so that masks of different dtypes compare by value.
    """
    if tensor is None:
        return None
    values = tensor.detach().reshape(-1)
    if values.dtype == torch.bool or values.is_floating_point():
        values = values.float().view(torch.int32)
    place = torch.arange(values.numel(), dtype=torch.int64, device=values.device)
    mixed = values.long() + place * -0x61C8864680B583EB  # the constants of splitmix64
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return Fingerprint(tuple(tensor.shape), int(mixed.sum()))


def _exchange(
    group: ProcessGroup, message: str | None, facts: dict[str, Any] | None
) -> dict[int, Message]:
    """The messages of all ranks, by global rank; the same on every rank."""
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, (message, facts), group=group)
    return dict(zip(dist.get_process_group_ranks(group), told, strict=True))


def _compare(told: dict[int, Message]) -> None:
    """Raise ValueError if a rank has raised or the facts differ. Every rank that has not raised
    itself raises the same error."""
    for rank, (message, _) in told.items():
        if message is not None:
            raise ValueError(f"rank {rank}, which shares this vocabulary, stopped: {message}")
    facts = {rank: held for rank, (_, held) in told.items() if held is not None}
    known = dict.fromkeys(name for held in facts.values() for name in held)
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


def _differs(name: str, facts: dict[int, dict[str, Any]]) -> bool:
    values = [held.get(name) for held in facts.values()]
    return any(value != values[0] for value in values)


def _difference(name: str, facts: dict[int, dict[str, Any]]) -> str:
    """The values and the ranks that hold them."""
    holders: dict[str, list[int]] = {}
    for rank, held in facts.items():
        holders.setdefault(repr(held.get(name)), []).append(rank)
    if any(isinstance(held.get(name), Fingerprint) for held in facts.values()):
        return f"{name} on ranks " + " than on ranks ".join(map(str, reversed(holders.values())))
    return f"{name}: " + ", ".join(f"{value} on ranks {at}" for value, at in holders.items())

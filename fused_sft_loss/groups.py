"""Process groups: what `tp_group` may be, and the name of a group in pickles and operators."""

from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupMember, _resolve_process_group


class NamedGroup(NamedTuple):
    """A process group in a pickle or a copy: torch's name for it, and its global ranks."""

    name: str
    ranks: tuple[int, ...]


def process_group(given: object) -> ProcessGroup | None:
    """The process group of a `tp_group` argument: None, a ProcessGroup, a DeviceMesh of one
    dimension, or a NamedGroup.

    Raises:
        TypeError, ValueError: it is something else, or a group without this rank.
    """
    if given is None:
        return None
    if isinstance(given, ProcessGroup):
        group = given
    elif isinstance(given, NamedGroup):
        group = found(given)
    elif isinstance(given, DeviceMesh):
        group = _of_mesh(given)
    elif given is GroupMember.NON_GROUP_MEMBER:  # new_group returns it to ranks outside
        raise ValueError(_without_this_rank())
    else:
        raise TypeError(
            "tp_group: expected a torch.distributed process group, a DeviceMesh of one dimension "
            f"or None, got {type(given).__name__} {given!r}; make a group with "
            "torch.distributed.new_group(ranks)"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(_without_this_rank())
    return group


def named(group: ProcessGroup) -> NamedGroup:
    return NamedGroup(group.group_name, tuple(dist.get_process_group_ranks(group)))


def by_name(name: str) -> ProcessGroup:
    """The group that torch registered under this name in this process.

    Operators cannot take a ProcessGroup, so it travels by the name that torch's own functional
    collectives use.
    """
    return _resolve_process_group(name)  # type: ignore[arg-type, unused-ignore]  # a NewType of str


def found(wanted: NamedGroup) -> ProcessGroup:
    """The group of that name in this process.

    Raises:
        ValueError: there is no such group, or it has other ranks.
    """
    advice = (
        'Initialise torch.distributed and the same groups, or set options["tp_group"] of the '
        "SFTLoss to a group of this process (None: the vocabulary is not sharded)"
    )
    what = f"tp_group: expected the process group {wanted.name!r} of ranks {list(wanted.ranks)}"
    try:
        group = by_name(wanted.name)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{what}, got a process without it. {advice}") from error
    ranks = dist.get_process_group_ranks(group)
    if tuple(ranks) != wanted.ranks:
        raise ValueError(f"{what}, got ranks {ranks} under that name. {advice}")
    return group


def _of_mesh(mesh: DeviceMesh) -> ProcessGroup:
    if mesh.ndim != 1:
        raise ValueError(
            f"tp_group: expected a DeviceMesh of one dimension, got {mesh.ndim} with names "
            f'{mesh.mesh_dim_names}; pass the one the vocabulary is sharded over, as mesh["tp"]'
        )
    if mesh.get_coordinate() is None:
        raise ValueError(_without_this_rank())
    return mesh.get_group()


def _without_this_rank() -> str:
    return (
        f"tp_group: expected a group with this rank {dist.get_rank()} in it, got one without; call "
        "the loss only on the ranks of the group that shards their logits"
    )

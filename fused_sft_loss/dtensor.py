"""Logits that are a DTensor: group, first id and size of the vocabulary come from its placement.

    placements of the logits                          the loss computes on
    Shard(last dimension) on one mesh dimension,      this rank's columns, with that dimension's
    Replicate() on the others                         group
    Replicate() on all                                the whole vocabulary, without a group
    anything else                                     nothing: an error

Labels, mask and boundaries are plain tensors, or replicated. The result is a plain tensor, equal on
all ranks of the group. The gradient is a DTensor of the logits' placements.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import inplace
from .options import Options


def is_dtensor(value: object) -> bool:
    return hasattr(value, "to_local")


def placed(logits: Any, options: Options) -> Options:
    """The options with the group and the vocabulary that the logits' placement states.

    Every rank raises the same error, because every rank knows the whole placement.

    Raises:
        ValueError: another placement, or options that say what the placement says.
    """
    for name in ("tp_group", "vocab_start"):
        if (given := getattr(options, name)) is not None:
            raise ValueError(
                f"expected no {name} with logits that are a DTensor, whose placement says it, got "
                f"{given!r}; drop {name}"
            )
    sharded = _sharded_dimension(logits)
    size = logits.shape[-1] if options.vocab_size is None else options.vocab_size
    if sharded is None:
        return replace(options, vocab_size=size)
    mesh = logits.device_mesh
    start = _first_id(logits.shape[-1], mesh.size(sharded), mesh.get_local_rank(sharded))
    group = mesh.get_group(sharded)
    return replace(options, tp_group=group, vocab_start=start, vocab_size=size)


def _sharded_dimension(logits: Any) -> int | None:
    """The mesh dimension that shards the vocabulary, or None."""
    from torch.distributed.tensor import Shard

    kept = [at for at, kind in enumerate(logits.placements) if not kind.is_replicate()]
    last = logits.dim() - 1
    # A subclass of Shard (torch's own _StridedShard) orders the columns in another way.
    if any(type(logits.placements[at]) is not Shard for at in kept) or len(kept) > 1:
        right = False
    else:
        right = all(logits.placements[at].dim in (last, -1) for at in kept)
    if not right:
        raise ValueError(
            "expected logits sharded on the vocabulary over one mesh dimension and replicated over "
            f"the others (Shard({last}) or Replicate()), got {tuple(logits.placements)} over "
            f"{logits.device_mesh}; use logits.redistribute(placements=...). For a sharded batch "
            "or sequence pass the local parts: logits.to_local(), labels.to_local()"
        )
    return kept[0] if kept else None


def _first_id(columns: int, ranks: int, rank: int) -> int:
    """The first id of a rank in a vocabulary that is cut as by torch.chunk.

    An empty shard becomes one column of padding, see `_part`; the last ranks' columns lie behind
    the vocabulary, one after the other.
    """
    chunk = -(-columns // ranks)
    full = -(-columns // chunk)
    return rank * chunk if rank < full else columns + rank - full


def local(
    logits: Any, labels: Any, loss_mask: Any, options: Options
) -> tuple[Tensor, Any, Any, Options]:
    """The call on plain tensors, with `placed` options.

    Raises:
        ValueError: labels, mask or boundaries that are not replicated; logits that
            :func:`.inplace.prepare` refuses, or of another width than torch.chunk gives them.
    """
    labels, loss_mask = _replicated("labels", labels), _replicated("loss_mask", loss_mask)
    options = replace(options, cu_seqlens=_replicated("cu_seqlens", options.cu_seqlens))
    return _part(logits, options), labels, loss_mask, options


def _part(logits: Any, options: Options) -> Tensor:
    """This rank's part of the logits, differentiable, or one column of padding if it is empty."""
    overwrites = options.inplace_backward and logits.requires_grad and torch.is_grad_enabled()
    if overwrites:
        inplace.prepare(logits)
    part = logits.to_local()
    _check_columns(part.shape[-1], logits.shape[-1], options)
    if overwrites and not inplace.traced(part):
        # The write bumps the version counter of the part, and not that of the DTensor, by which an
        # operator that saved the DTensor notices. Ranks with an empty part must raise too.
        part.register_hook(lambda grad: torch.autograd.graph.increment_version(logits))
    return part if part.shape[-1] else F.pad(part, (0, 1))


def _check_columns(width: int, columns: int, options: Options) -> None:
    if isinstance(options.vocab_size, int) and options.vocab_size > columns:
        raise ValueError(
            f"expected vocab_size of at most {columns}, the columns of the DTensor on all its "
            f"ranks, got {options.vocab_size}"
        )
    want = columns
    if options.vocab_start is not None:
        ranks = options.tp_group.size()
        want = max(0, min(-(-columns // ranks), columns - options.vocab_start))
    if width != want:
        raise ValueError(
            f"expected {want} columns on this rank, of {columns} in shards as torch.chunk cuts "
            f"them, got {width}; pass logits.to_local() with tp_group, vocab_start and vocab_size"
        )


def _replicated(name: str, value: Any) -> Any:
    """The local tensor of a replicated DTensor. Anything else is returned as it is."""
    if not is_dtensor(value):
        return value
    if not all(kind.is_replicate() for kind in value.placements):
        raise ValueError(
            f"expected {name} to be a plain tensor or a replicated DTensor, the same on all ranks "
            f"that share the vocabulary, got {tuple(value.placements)} over {value.device_mesh}; "
            f"pass {name}.full_tensor()"
        )
    return value.to_local()

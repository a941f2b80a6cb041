"""A weight that data parallelism shards: a DTensor, as FSDP2's fully_shard makes it."""

from typing import Any

from torch import Tensor


def whole(weight: Any, tp_group: object) -> Tensor:
    """The weight, gathered if it is a DTensor; its gradient is then averaged over the ranks.

    Raises:
        ValueError: its mesh has several dimensions, or it is sharded otherwise than by rows.
    """
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial, Shard

    if tp_group is not None or weight.device_mesh.ndim != 1 or weight.placements != (Shard(0),):
        raise ValueError(
            "expected weight to be a plain tensor, or a DTensor sharded by rows over one mesh "
            f"dimension (FSDP2) and no tp_group, got placements {weight.placements} over "
            f"{weight.device_mesh}; pass weight.to_local() with tp_group for a shard of the "
            "vocabulary, or weight.full_tensor()"
        )
    return weight.full_tensor(grad_placements=[Partial("avg")])

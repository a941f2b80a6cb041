"""Count the collectives that a process of a test starts."""

import torch.distributed as dist

NAMES = (
    "all_gather_into_tensor",
    "all_gather",
    "all_gather_object",
    "all_to_all",
    "all_reduce",
    "reduce_scatter_tensor",
    "broadcast",
    "barrier",
)


def count_collectives():
    """Wrap torch.distributed's collectives; returns the list that records their calls."""
    calls = []
    for name in NAMES:
        original = getattr(dist, name)

        def noted(*args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        setattr(dist, name, noted)
    return calls

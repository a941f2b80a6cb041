"""Differences between megatron-core's versions.

    0.14   Float16Module always casts the logits to fp32. The schedule divides a 3-tuple's loss by
           num_tokens without a clamp (0.16 and 0.19 clamp it to 1); a gradient of 0 survives that.
    0.15   Float16Module.forward(fp32_output=...)
    0.18   GPTModel.forward(output_processor=...): a callback in place of output layer and loss
    0.19   get_batch_on_this_cp_rank(batch, is_hybrid_cp, ...): see `context_parallel_slice`

A version is recognised by what a signature accepts, never by a number: forks carry patches.
"""

import inspect
from typing import Any

from torch.distributed import ProcessGroup

from .global_state import parallel_state
from .wrappers import wrapped


def accepts(model: object, name: str) -> bool:
    """Whether forward takes the keyword argument `name`, on the model or on a model inside it."""
    return any(name in inspect.signature(part.forward).parameters for part in wrapped(model))


def context_parallel_slice(
    batch: dict[str, Any], cp_group: ProcessGroup | None = None
) -> dict[str, Any]:
    """`get_batch_on_this_cp_rank(batch)` of the installed megatron-core, zigzag over sequences.

    `batch` is a dict of tensors [b, s, ...] (attention_mask [b, 1, s, s]), None where absent. Shift
    labels and mask before: see `shift_packed_targets`.
    """
    from megatron.core.utils import get_batch_on_this_cp_rank

    accepted = inspect.signature(get_batch_on_this_cp_rank).parameters
    parallel = parallel_state()
    if cp_group is None and parallel is not None:
        cp_group = parallel.get_context_parallel_group()
    options = {"cp_group": cp_group, "is_hybrid_cp": False, "use_per_sequence_balancing": True}
    return get_batch_on_this_cp_rank(batch, **{k: v for k, v in options.items() if k in accepted})

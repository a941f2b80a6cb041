"""Megatron's main_grad: an fp32 sum over micro-batches that backward adds to itself.

The protocol is that of megatron.core.tensor_parallel.layers with gradient_accumulation_fusion:
backward adds to ``weight.main_grad``, sets ``weight.grad_added_to_main_grad`` where the optimizer
has put that flag, and returns a tensor of any values, so that autograd runs the weight's hooks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class MainGrad(NamedTuple):
    """The memory, and whether to add to it; otherwise it is written."""

    memory: Tensor
    add: bool


def kept(weight: Tensor, fused: bool) -> Tensor | None:
    """What a Function's context keeps to find main_grad: the parameter itself, or None.

    Under saved_tensors_hooks (offloading, checkpointing) a saved tensor comes back as a copy,
    without its attributes.
    """
    return weight if fused else None


def of(weight: Any) -> MainGrad:
    """The main_grad of a weight.

    Raises:
        ValueError: it has none.
    """
    if hasattr(weight, "__fsdp_param__"):  # Megatron-FSDP makes the memory for each backward
        return MainGrad(weight.get_main_grad(), add=False)
    if getattr(weight, "main_grad", None) is None:
        raise ValueError(
            "expected weight.main_grad, which gradient_accumulation_fusion adds to, got a weight "
            "without it; wrap the model in Megatron's DistributedDataParallel, or set "
            "gradient_accumulation_fusion=False"
        )
    return MainGrad(weight.main_grad, add=not getattr(weight, "overwrite_main_grad", False))


def reported(weight: Any) -> Tensor | None:
    """What backward returns for a weight whose gradient is in its main_grad."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight.detach())

"""The passes of one loss on CPU tensors, in the PTX interpreter."""

import ctypes

import numpy as np
import torch

from fused_sft_loss.backends.contract import normalizer_like

from ..ptx import Machine


class Passes:
    """The passes of one loss, kernel by kernel. Results: `loss` `[N]` fp32 (times weight), `grad`.

    A subclass launches `targets`, `statistics`, `merged` and `gradient`, and keeps the `counts` of
    each. Result tensors are filled beforehand with values that cannot pass for results.
    """

    def __call__(self):
        self.targets()
        self.statistics()
        self.merged()
        self.gradient()
        return self

    def unwritten_targets(self):
        rows = self.labels.numel()
        self.target = torch.full((rows,), -7)
        self.weight = torch.full((rows,), float("nan"))
        self.count, self.weight_sum = torch.tensor(-1, dtype=torch.int32), torch.tensor(-1.0)

    def unwritten_losses(self):
        self.loss = torch.full((self.labels.numel(),), float("nan"))
        self.normalizer = normalizer_like(self.loss).fill_(float("nan"))

    def unwritten_gradient(self) -> torch.Tensor:
        """A separate tensor with the strides of the logits."""
        logits = self.logits
        apart = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype)
        return apart.fill_(float("nan"))


def share(machine: Machine, name: str, tensor: torch.Tensor) -> None:
    """Give kernels access to a tensor's memory. A storage keeps the name of its first tensor."""
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in machine.memory.starts:
        memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
        machine.add(name, np.ctypeslib.as_array(memory))

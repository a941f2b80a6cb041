"""The passes of one loss on CPU tensors, as the PTX interpreter runs them."""

import ctypes

import numpy as np
import torch

from ..ptx import Machine


class Passes:
    """The passes of one loss, kernel by kernel: `loss` `[N]` fp32 (times weight) and `grad`.

    Whoever derives says how `targets`, `statistics`, `merged` and `gradient` are launched, and
    keeps `counts` of each. What they write holds nothing that could pass for a result before.
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
        self.normalizer = torch.full((self.labels.numel(), 2), float("nan"))

    def unwritten_gradient(self) -> torch.Tensor:
        """Apart from the logits, in rows that lie as theirs do."""
        logits = self.logits
        apart = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype)
        return apart.fill_(float("nan"))


def share(machine: Machine, name: str, tensor: torch.Tensor) -> None:
    """Let kernels reach the tensor's memory; a second tensor in it keeps the first one's name."""
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in machine.memory.starts:
        memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
        machine.add(name, np.ctypeslib.as_array(memory))

"""Launch on the device of the tensors, even if another one is current, and on its stream."""

from contextlib import AbstractContextManager, nullcontext

import torch


def on(device: torch.device) -> AbstractContextManager:
    """A context in which `device` is the current GPU. For a CPU it does nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def stream(device: torch.device) -> int:
    """The address of the device's current stream; 0 for a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

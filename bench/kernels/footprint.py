"""Peak memory of one run of a provider, beyond the logits, labels and mask."""

from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from ..memory import MemoryRecord
from .oracle import run_once
from .problem import attached


@dataclass(frozen=True)
class Footprint:
    """Bytes at peak.

    forward   in the forward pass
    full      in forward and backward; a gradient outside the logits' memory counts
    resident  the same as `full`, measured by the resident set; None if unknown
    """

    forward: int
    full: int
    resident: int | None


def footprint(provider, problem, warm=False):
    """Footprint of `provider` on this rank's part of the problem.

    warm  the provider has run on these shapes in this process: its code is compiled, and the memory
          that its library keeps is allocated
    """
    function = provider.function(problem)
    if not warm:
        run_once(function, problem)
    device = problem.source.device
    with MemoryRecord(device) as record:
        logits = attached(problem.source.logits.clone())
        record.mark("begin")
        loss = function(logits)
        record.mark("forward")
        (gradient,) = torch.autograd.grad(loss, logits, problem.upstream)
        record.mark("end")
        del gradient
    forward, full = record.usage("begin", "forward"), record.usage("begin", "end")
    return Footprint(forward.peak, full.peak, full.resident_peak)


def largest(mine):
    """The Footprint of the rank with the largest peak, as a dict; the same on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return asdict(mine)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, asdict(mine))
    return max(everyone, key=lambda usage: usage["full"])

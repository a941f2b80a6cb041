"""Measures the loss stage, which is defined in the same way for every loss function:

forward   from the call of loss_func(output_tensor) to its return
backward  from the time when the gradient of the returned loss is known to the time when the
          gradient of output_tensor is known; autograd hooks see both

output_tensor is the model's output, this rank's shard of the logits. The stage includes all copies,
casts and collectives of the loss. It does not include the model.
"""

from functools import partial

import torch.distributed as dist

from ..clock import Clock
from ..memory import MemoryRecord


class LossStage:
    """Wraps a forward_step to time or record the loss stage of one micro-batch."""

    def __init__(self, device="cpu"):
        self.device = device
        self.seconds = []  # (forward, backward) of each timed micro-batch
        self.memory = None  # of the recorded one, see record()
        self.logits = None  # its shape, dtype and bytes
        self._event = None

    def watch(self, forward_step):
        """Wrap forward_step. Run the result inside `time` or `record`, which see its loss stage."""

        def watched(data_iterator, model):
            output_tensor, loss_func = forward_step(data_iterator, model)
            return output_tensor, partial(self._watched_loss, loss_func)

        return watched

    def _watched_loss(self, loss_func, output_tensor, **options):
        event = self._event
        if dist.get_world_size() > 1:  # else a collective would include the wait for a peer
            dist.barrier()
        event("forward begin")
        result = loss_func(output_tensor, **options)
        event("forward end")
        result[0].register_hook(lambda grad: event("backward begin"))
        output_tensor.register_hook(lambda grad: event("backward end"))
        self.logits = {
            "shape": list(output_tensor.shape),
            "dtype": str(output_tensor.dtype).removeprefix("torch."),
            "bytes": output_tensor.numel() * output_tensor.element_size(),
        }
        return result

    def time(self, step):
        """Run `step()`, one micro-batch forward and backward, and keep its two times."""
        clock = Clock(self.device)
        # The order of the four events is fixed. A mark does not wait, so the stage runs as usual.
        self._event = lambda name: clock.mark()
        result = step()
        forward, _, backward = clock.intervals()
        self.seconds.append((forward, backward))
        return result

    def record(self, step):
        """Run `step()` and keep the bytes of the loss stage, above the level when it began.

        The record is opened before the model runs. So it has seen the allocation of all memory that
        the stage releases.
        """
        with MemoryRecord(self.device) as memory:
            memory.mark("step begin")
            self._event = memory.mark
            result = step()
            memory.mark("step end")
        forward = memory.usage("forward begin", "forward end")
        backward = memory.usage("backward begin", "backward end", base="forward begin")
        self.memory = {
            "forward_peak": forward.peak,
            "held": forward.held,
            "backward_peak": backward.peak,
            "step_peak": memory.usage("step begin", "step end").peak,
            "forward_resident_peak": forward.resident_peak,
            "backward_resident_peak": backward.resident_peak,
        }
        return result

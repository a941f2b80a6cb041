"""What the loss stage is, and when it begins and ends: the same for every loss function.

forward   from the call of loss_func(output_tensor) to its return
backward  from the gradient of the returned loss being known to the gradient of output_tensor being
          known, both seen by autograd hooks

output_tensor is what the model returned, this rank's shard of the logits. Whatever a loss does to
get from there to a number and back is in: copies, casts, collectives. The model is not.
"""

from functools import partial

import torch.distributed as dist

from ..clock import Clock
from ..memory import MemoryRecord


class LossStage:
    """Wraps a forward_step so that the loss stage of one micro-batch is timed or recorded."""

    def __init__(self, device="cpu"):
        self.device = device
        self.seconds = []  # (forward, backward) of each timed micro-batch
        self.memory = None  # of the recorded one, see record()
        self.logits = None  # its shape, dtype and bytes
        self._event = None

    def watch(self, forward_step):
        """The same forward_step, watched while `timing` or `recording` is on."""

        def watched(data_iterator, model):
            output_tensor, loss_func = forward_step(data_iterator, model)
            return output_tensor, partial(self._watched_loss, loss_func)

        return watched

    def _watched_loss(self, loss_func, output_tensor, **options):
        event = self._event
        if dist.get_world_size() > 1:  # a collective would be charged for a peer's lateness
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
        # The four events come in this order. Nobody waits: the stage is timed as it runs in a step.
        self._event = lambda name: clock.mark()
        result = step()
        forward, _, backward = clock.intervals()
        self.seconds.append((forward, backward))
        return result

    def record(self, step):
        """Run `step()` and keep the bytes of the loss stage, beyond those at its beginning.

        Open before the model runs, so that every release in the stage is of something recorded.
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

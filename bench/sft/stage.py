"""Measures two stages, which are defined in the same way for every loss function.

The loss:
forward   from the call of loss_func(output_tensor) to its return
backward  from the time when the gradient of the returned loss is known to the time when the
          gradient of output_tensor is known; autograd hooks see both

output_tensor is the model's output, this rank's shard of the logits. The stage includes all copies,
casts and collectives of the loss. It does not include the model. A loss without logits is computed
by the output layer, so it has no such stage.

The output layer and its loss:
forward   from the call of the output layer to the return of loss_func
backward  from the time when the gradient of the returned loss is known to the time when that of the
          hidden states is known. It includes the gradient of the layer's weight
"""

from functools import partial

import torch.distributed as dist

from fused_sft_loss.megatron import wrappers

from ..clock import Clock
from ..memory import MemoryRecord


class LossStage:
    """Wraps a forward_step to time or record both stages of one micro-batch.

    has_logits: the model returns logits, so the loss has a stage
    """

    def __init__(self, device="cpu", has_logits=True):
        self.device, self.has_logits = device, has_logits
        self.seconds = []  # (forward, backward) of the loss, in each timed micro-batch
        self.head_seconds = []  # the same of the output layer and its loss
        self.memory = None  # of the recorded one, see record()
        self.logits = None  # its shape, dtype and bytes
        self._event = None

    def watch(self, forward_step):
        """Wrap forward_step. Run the result inside `time` or `record`, which see its stages."""

        def watched(data_iterator, model):
            layer = wrappers.attribute(model, "output_layer")
            hook = layer.register_forward_pre_hook(self._head_begins)
            try:
                output_tensor, loss_func = forward_step(data_iterator, model)
            finally:
                hook.remove()
            return output_tensor, partial(self._watched_loss, loss_func)

        return watched

    def _head_begins(self, layer, inputs):
        event = self._event
        inputs[0].register_hook(lambda grad: event("head end"))
        event("head begin")

    def _watched_loss(self, loss_func, output_tensor, **options):
        event = self._event
        if dist.get_world_size() > 1:  # else a collective would include the wait for a peer
            dist.barrier()
        event("forward begin")
        result = loss_func(output_tensor, **options)
        event("forward end")
        result[0].register_hook(lambda grad: event("backward begin"))
        output_tensor.register_hook(lambda grad: event("backward end"))
        if self.has_logits:
            self.logits = {
                "shape": list(output_tensor.shape),
                "dtype": str(output_tensor.dtype).removeprefix("torch."),
                "bytes": output_tensor.numel() * output_tensor.element_size(),
            }
        return result

    def time(self, step):
        """Run `step()`, one micro-batch forward and backward, and keep the times of its stages."""
        clock = Clock(self.device)
        # The order of the six events is fixed. A mark does not wait, so the stages run as usual.
        self._event = lambda name: clock.mark()
        result = step()
        layer, forward, _, backward, layer_backward = clock.intervals()
        self.head_seconds.append((layer + forward, backward + layer_backward))
        if self.has_logits:
            self.seconds.append((forward, backward))
        return result

    def record(self, step):
        """Run `step()` and keep the bytes of the stages, above the level when each began.

        The record is opened before the model runs. So it has seen the allocation of all memory that
        the stages release.
        """
        with MemoryRecord(self.device) as memory:
            memory.mark("step begin")
            self._event = memory.mark
            result = step()
            memory.mark("step end")
        head = memory.usage("head begin", "forward end")
        head_backward = memory.usage("backward begin", "head end", base="head begin")
        self.memory = {
            **(_of_loss(memory) if self.has_logits else {}),
            "head_peak": max(head.peak, head_backward.peak),
            "head_held": head.held,
            "step_peak": memory.usage("step begin", "step end").peak,
        }
        return result


def _of_loss(memory):
    """Bytes of the loss, above the level when it began."""
    forward = memory.usage("forward begin", "forward end")
    backward = memory.usage("backward begin", "backward end", base="forward begin")
    return {
        "forward_peak": forward.peak,
        "held": forward.held,
        "backward_peak": backward.peak,
        "forward_resident_peak": forward.resident_peak,
        "backward_resident_peak": backward.resident_peak,
    }

"""Losses of other libraries, called as their own documentation says. None is a dependency.

Each gets its best case: contiguous logits in its own layout, labels that are already shifted, and
masked labels as ignored labels if it has them.
"""

import importlib.util
from functools import cache

import torch
import torch.distributed as dist

from .provider import source_of


def reason_without_megatron(case=None, device_type=None):
    found = importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core")
    return None if found else "not installed: pip install megatron-core"


@cache
def set_up_megatron(device):
    """Make Megatron's groups over all processes, once. Only losses that need them call this: the
    import takes seconds."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.initialize_model_parallel(dist.get_world_size())
    if device.type == "cpu":  # the gather allocates on "the current CUDA device"
        torch.cuda.current_device = lambda: device


def megatron(problem):
    """megatron-core's default loss: [s, b, v/tp] logits, labels [s, b]."""
    set_up_megatron(problem.source.device)
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    target = problem.inside.view(-1, 1)

    def loss(logits):
        rows = logits.view(-1, 1, logits.size(-1))
        return problem.mean(vocab_parallel_cross_entropy(rows, target))

    return loss


def megatron_fused(problem):
    """megatron-core's loss under cross_entropy_loss_fusion; its gradient is always bf16."""
    set_up_megatron(problem.source.device)
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    target, group = problem.inside.view(-1, 1), get_tensor_model_parallel_group()

    def loss(logits):
        rows = logits.view(-1, 1, logits.size(-1))
        return problem.mean(fused_vocab_parallel_cross_entropy(rows, target, group))

    return loss


def liger(problem):
    """Liger's cross-entropy. Forward already writes the gradient over the logits.

    It stores each row's loss in the logits' dtype before it takes the mean.
    """
    from liger_kernel.transformers.functional import liger_cross_entropy

    def loss(logits):
        rows = logits.view(-1, logits.size(-1))
        return liger_cross_entropy(
            rows,
            problem.target,
            ignore_index=-100,
            reduction="mean",
            softcap=problem.case.softcap,
        )

    return loss


def liger_megatron(problem):
    """Liger's drop-in for Megatron's vocab-parallel loss."""
    from liger_kernel.megatron.cross_entropy import LigerMegatronCrossEntropy

    module, target = LigerMegatronCrossEntropy(ignore_index=-100), problem.target.view(-1, 1)

    def loss(logits):
        rows = logits.view(-1, 1, logits.size(-1))
        return problem.mean(module(rows, target, problem.group))

    return loss


def transformer_engine(problem, inplace):
    """TransformerEngine's loss. Old versions are a Function.apply: positional arguments only.

    From 2.20 on it copies the logits in forward, and backward overwrites the copy; with
    overwrite_input=True it overwrites the logits. 2.18 makes an fp32 gradient, older versions
    overwrite the logits. Read in 2.5, 2.9, 2.17, 2.18 (sources) and 2.20.2 (wheel).
    """
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    target = problem.target.view(1, -1)
    options = {OVERWRITES: True} if inplace else {}

    def loss(logits):
        rows = logits.view(1, -1, logits.size(-1))
        # label_smoothing, reduce_loss, dist_process_group, ignore_idx
        given = rows, target, 0.0, False, problem.group, -100
        return problem.mean(parallel_cross_entropy(*given, **options))

    return loss


OVERWRITES = "overwrite_input"


def reason_against_overwriting(case, device_type):
    """Read from TransformerEngine's source, because its import takes seconds."""
    text = source_of("transformer_engine", "pytorch/cross_entropy.py")
    if text is not None and OVERWRITES in text:
        return None
    return f"needs transformer_engine >= 2.20, which has {OVERWRITES}"


class _Aiter(torch.autograd.Function):
    """aiter has the two passes, but no autograd function; frameworks wrap them like this."""

    @staticmethod
    def forward(ctx, rows, target, group):
        from aiter.ops.triton.cross_entropy import cross_entropy_forward

        # label_smoothing, reduce_loss, dist_group, ignore_idx
        losses, gradient = cross_entropy_forward(rows, target, 0.0, False, group, -100)
        ctx.save_for_backward(gradient.detach())
        return losses

    @staticmethod
    def backward(ctx, upstream):
        from aiter.ops.triton.cross_entropy import cross_entropy_backward

        (gradient,) = ctx.saved_tensors
        return cross_entropy_backward(gradient, upstream, is_cg_capturable=True), None, None


def aiter(problem):
    """AMD's loss. Forward writes the gradient over the logits, backward multiplies it.

    is_cg_capturable skips a comparison with 1 that waits for the GPU. Read in ROCm/aiter at
    0addc345e580.
    """
    target = problem.target.view(1, -1)

    def loss(logits):
        rows = logits.view(1, -1, logits.size(-1))
        return problem.mean(_Aiter.apply(rows, target, problem.group))

    return loss


def reason_against_aiter(case, device_type):
    if not torch.version.hip:
        return "runs on AMD GPUs; this torch is built for others"
    if source_of("aiter", "ops/triton/cross_entropy.py") is None:
        return "this aiter has no ops.triton.cross_entropy; install a newer one"
    return None


def flash_attention(problem, inplace):
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def loss(logits):
        losses, _ = cross_entropy_loss(
            logits.view(-1, logits.size(-1)),
            problem.target,
            ignore_index=-100,
            inplace_backward=inplace,
            process_group=problem.group,
        )
        return problem.mean(losses)

    return loss


def quack(problem, inplace):
    """Read in the wheel of quack-kernels 0.6.5."""
    from quack.cross_entropy import cross_entropy

    def loss(logits):
        losses = cross_entropy(
            logits.view(-1, logits.size(-1)),
            problem.target,
            ignore_index=-100,
            reduction="none",
            inplace_backward=inplace,
        )
        return problem.mean(losses)

    return loss


def fp32_is_not_for_fused(case, device_type):
    if reason := reason_without_megatron():
        return reason
    return None if case.dtype == "bf16" else "its gradient is always bf16, whatever the logits are"

"""Losses of other libraries, called as their own documentation says. None is a dependency.

Each gets its best case: contiguous logits in its own layout, labels that are already shifted, and
masked labels as ignored labels if it has them.
"""

import importlib.util
from functools import cache, partial

import torch
import torch.distributed as dist

from .provider import Provider


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


def transformer_engine(problem):
    """TransformerEngine's loss. Old versions are a Function.apply: positional arguments only."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    target = problem.target.view(1, -1)

    def loss(logits):
        rows = logits.view(1, -1, logits.size(-1))
        # label_smoothing, reduce_loss, dist_process_group, ignore_idx
        return problem.mean(parallel_cross_entropy(rows, target, 0.0, False, problem.group, -100))

    return loss


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


def _fp32_is_not_for_fused(case, device_type):
    if reason := reason_without_megatron():
        return reason
    return None if case.dtype == "bf16" else "its gradient is always bf16, whatever the logits are"


ON_GPU = {"devices": ("cuda",), "writes": True}

# The predicted bytes per element come from the peers' sources; Megatron's were measured. Both
# Megatron losses overwrite fp32 logits, so `writes` is True.
PEERS = (
    Provider(
        "megatron",
        "Megatron vocab_parallel",
        megatron,
        ((0, 0, 1), (0, 1, 1)),
        reason=reason_without_megatron,
        writes=True,
    ),
    Provider(
        "megatron-fused",
        "Megatron fused",
        megatron_fused,
        ((0, 0, 1), (6, 0, 1)),
        reason=_fp32_is_not_for_fused,
        writes=True,
    ),
    Provider(
        "liger",
        "Liger cross-entropy",
        liger,
        ((0, 0, 0), (0, 0, 0)),
        module="liger_kernel",
        install="liger-kernel",
        sharded=False,
        precision="logits",
        softcap=True,
        one_read=True,
        **ON_GPU,
    ),
    Provider(
        "liger-megatron",
        "Liger vocab-parallel",
        liger_megatron,
        ((4, 0, 0), (4, 1, 0)),
        module="liger_kernel",
        install="liger-kernel",
        **ON_GPU,
    ),
    Provider(
        "te",
        "TransformerEngine",
        transformer_engine,
        ((0, 0, 0), (0, 0, 0)),
        module="transformer_engine",
        install="transformer_engine[pytorch]",
        **ON_GPU,
    ),
    *(
        Provider(
            f"{name}{suffix}",
            f"{title}, {mode}",
            partial(build, inplace=inplace),
            peak,
            module=module,
            install=install,
            sharded=sharded,
            **ON_GPU,
        )
        for name, title, build, module, install, sharded in (
            (
                "flash-attn",
                "flash-attention Triton",
                flash_attention,
                "flash_attn",
                "flash-attn",
                True,
            ),
            ("quack", "quack", quack, "quack", "quack-kernels", False),
        )
        for suffix, mode, inplace, peak in (
            ("", "new gradient", False, ((0, 0, 0), (0, 1, 0))),
            ("-inplace", "in place", True, ((0, 0, 0), (0, 0, 0))),
        )
    ),
)

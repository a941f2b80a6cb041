"""vocab_parallel_cross_entropy: the loss as the operator that Megatron's LanguageModule calls."""

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .. import agreement, checks
from ..api import sft_loss
from . import preconditions
from .context import ALLOWED


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    tp_group: ProcessGroup | DeviceMesh | None = None,
    *,
    loss_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Per-token losses `[s, b]` of logits `[s, b, V/tp]`, as megatron-core's cross-entropies.

    It takes the place of `fused_vocab_parallel_cross_entropy(logits, target, tp_group)`, in code of
    yours that calls it. To replace the cross-entropy of one model use `fused_cross_entropy`, which
    restores the model and reads no masked row. Neither changes Megatron's modules.

    Args:
        logits: [s, b, V/tp] bf16, fp16 or fp32: this rank's shard. They are not modified.
        labels: [s, b] integer token ids of the whole vocabulary, shifted already.
        tp_group: the group that shards the vocabulary. None: Megatron's tensor-parallel group;
            before Megatron is initialised the logits are whole.
        loss_mask: [s, b]: positions with 0 are not read and have loss 0. It selects and does not
            weigh, because the trainer multiplies by it.
        **options: those of `fused_cross_entropy`, and `vocab_start`.

    Returns:
        fp32 losses [s, b] with a graph, 0 where not scored.

    Raises:
        TypeError: an unknown option; what `sft_loss` raises.
        ValueError: labels or loss_mask that are not [s, b]; what `sft_loss` raises.
    """
    group: Any = "megatron" if tp_group is None else tp_group
    group = preconditions.vocab_group({**options, "tp_group": group})
    try:
        allowed = (*ALLOWED, "vocab_start")
        if unknown := sorted(set(options) - set(allowed)):
            raise TypeError(
                f"vocab_parallel_cross_entropy: unknown options {unknown}; expected {allowed}"
            )
        checks.are_tensors(logits=logits, labels=labels, loss_mask=loss_mask)
        _check_shape("labels", labels, logits)
        if loss_mask is not None:
            _check_shape("loss_mask", loss_mask, logits)
            loss_mask = (loss_mask != 0).t()
    except Exception as error:
        agreement.tell(error, group, logits)
        raise
    losses = sft_loss(
        logits,
        labels.t(),
        loss_mask,
        shift=False,
        layout="sbv",
        reduction="none",
        tp_group=group,
        **options,
    )
    return losses.t()


def _check_shape(name: str, tensor: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless the tensor is [s, b] and the logits are [s, b, v]."""
    if logits.dim() == 3 and tensor.shape == logits.shape[:2]:
        return
    hint = f"; pass {name}.t()" if tensor.shape[::-1] == logits.shape[:2] else ""
    raise ValueError(
        f"expected logits [s, b, V/tp] and {name} [s, b], got {list(logits.shape)} and "
        f"{list(tensor.shape)}{hint}"
    )

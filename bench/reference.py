"""The loss that SFT scripts write by hand. fused_sft_loss is compared with it.

It copies the logits to shift them, copies them to fp32, computes the cross-entropy of each token
and applies the mask. Several buffers have twice the size of bf16 logits, even if few tokens are
scored.
"""

import inspect
from functools import partial

import torch
import torch.nn.functional as F


def reference_loss(logits, labels, loss_mask):
    """Mean cross-entropy of predicting labels[:, t+1] from logits[:, t], for tokens in the mask.

    logits     [b, s, v] floating point, the whole vocabulary
    labels     [b, s] int64, the input ids, not shifted
    loss_mask  [b, s] 0/1, aligned with `labels`
    Returns a 0-d fp32 tensor: sum(loss * mask) / sum(mask), or 0 with a graph if nothing is scored.
    """
    predicted = logits[..., :-1, :].contiguous()
    target = labels[..., 1:].contiguous()
    mask = loss_mask[..., 1:].contiguous().view(-1).float()
    rows = predicted.view(-1, predicted.size(-1)).float()
    losses = F.cross_entropy(rows, target.view(-1), reduction="none")
    scored = mask.sum()
    # No branch on a value, so that torch.compile makes one graph.
    return (losses * mask).sum() / torch.where(scored > 0, scored, 1.0)


def reference_loss_func(labels, loss_mask, output_tensor):
    """`reference_loss` as a Megatron loss_func: (mean loss, {"lm loss": report}).

    output_tensor  [b, s, v/tp], from the model called without labels
    """
    loss = reference_loss(gather_vocabulary(output_tensor), labels, loss_mask)
    # The schedule divides the loss in place, so the report needs its own memory.
    return loss, {"lm loss": loss.detach().clone()}


def gather_vocabulary(logits):
    """Gather [b, s, v/tp] of all tensor-parallel ranks to [b, s, v]; for tp=1 return `logits`.

    F.cross_entropy needs the whole vocabulary: without the gather, the loss is wrong with tensor
    parallelism. The gathered copy has tp times the size of a rank's logits. It is a real cost of
    this loss.
    """
    from megatron.core.parallel_state import get_tensor_model_parallel_world_size
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    if get_tensor_model_parallel_world_size() == 1:
        return logits
    return gather_from_tensor_model_parallel_region(logits)


def make_reference_forward_step(get_batch):
    """A Megatron forward_step with the reference loss.

    `get_batch(data_iterator)` returns a dict of tokens, position_ids, attention_mask, labels and
    loss_mask, each [b, s] (attention_mask: None).
    """

    def forward_step(data_iterator, model):
        batch = get_batch(data_iterator)
        keep = "fp32_output" in inspect.signature(model.forward).parameters
        inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
        output = model(*inputs, **({"fp32_output": False} if keep else {}))
        return output, partial(reference_loss_func, batch["labels"], batch["loss_mask"])

    return forward_step

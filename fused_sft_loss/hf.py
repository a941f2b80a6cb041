"""The loss for Hugging Face's Trainer; docs/trainers.md has the lines to copy.

The Trainer takes the labels out of the batch, so that the model computes no loss of its own. It
then calls a function with the model's outputs. This module does not import transformers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .api import sft_loss

#: Options that a Trainer has no use for, with the reason.
REFUSED = {
    "reduction": "the sum is divided by num_items_in_batch, a number of tokens. The Trainer does "
    "not count samples, so there is no sample_mean under gradient accumulation",
    "layout": "the Trainer's batches are [b, s]",
    "cu_seqlens": "it differs between batches; the collator puts -100 at the first token of each "
    "packed document instead",
}


def compute_loss_func(
    outputs: Any,
    labels: Tensor | None,
    num_items_in_batch: int | Tensor | None = None,
    *,
    aux_loss_coef: float | None = None,
    **options: Any,
) -> Tensor:
    """The ``compute_loss_func`` of Hugging Face's Trainer: sum of losses / num_items_in_batch.

    Loss and gradient equal those of a causal language model's own loss, under gradient accumulation
    too. Set options with `functools.partial`::

        Trainer(..., compute_loss_func=partial(compute_loss_func, inplace_backward=True))

    Args:
        outputs: of the model: a mapping with "logits", a tuple that begins with them, or the
            logits.
        labels: `[b, s]`, not shifted. -100 is not scored.
        num_items_in_batch: the number of scored tokens in all batches of the optimizer step. The
            Trainer counts them. None: the mean of this batch.
        aux_loss_coef: the factor of the router's `aux_loss` in a mixture of experts; pass
            ``model.config.router_aux_loss_coef``. It is required if the outputs have that loss.
        **options: those of :func:`sft_loss` except `reduction`, `layout` and `cu_seqlens`.
            `grad_in_forward` is True, or the gradient of the result of this function.

    Returns:
        The loss, fp32, 0-d. It is 0 with a graph if nothing is scored.

    Raises:
        TypeError, ValueError: a wrong argument, as in :func:`sft_loss`; or a model whose labels are
            not shifted.
    """
    for name in options.keys() & REFUSED.keys():
        raise TypeError(f"expected no {name} under the Trainer, got one; drop it: {REFUSED[name]}")
    if labels is None:
        raise ValueError(
            "expected labels, got None: the batch has no 'labels'. Use a collator that makes them, "
            "such as DataCollatorForLanguageModeling(tokenizer, mlm=False)"
        )
    logits = _logits(outputs)
    if options.get("shift", True):
        _shifts(outputs)
    auxiliary = _auxiliary(outputs, aux_loss_coef)
    if num_items_in_batch is None:
        loss = sft_loss(logits, labels, reduction="mean", **options)
    else:
        divisor = _divisor(num_items_in_batch, logits)
        if "grad_in_forward" in options:
            options["grad_in_forward"] = _of_each(options["grad_in_forward"], divisor, logits)
        loss = sft_loss(logits, labels, reduction="sum", **options) / divisor
    return loss if auxiliary is None else loss + auxiliary.to(loss)


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    else:
        logits = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
    if not isinstance(logits, Tensor):
        got = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise TypeError(
            f"expected outputs with 'logits', or a tuple that begins with them, got {got}; use a "
            "model with a language-modelling head, and no option that leaves the logits out"
        )
    return logits


def _shifts(outputs: Any) -> None:
    """Raise ValueError for a model that predicts label t in row t: the shift would be wrong."""
    kind = type(outputs).__name__
    encoded = isinstance(outputs, Mapping) and "encoder_last_hidden_state" in outputs
    if encoded or kind == "MaskedLMOutput":
        raise ValueError(
            f"expected outputs of a causal language model, got {kind}, where row t predicts label "
            "t and not label t + 1; pass shift=False"
        )


def _auxiliary(outputs: Any, coefficient: float | None) -> Tensor | None:
    """The router's loss times its coefficient, or None. A model adds it to its own loss only."""
    found = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
    if not isinstance(found, Tensor):
        return None
    if coefficient is None:
        raise ValueError(
            "expected aux_loss_coef, got None for outputs with the aux_loss of a router, which the "
            "model adds only to its own loss; pass aux_loss_coef="
            "model.config.router_aux_loss_coef, or 0 to leave it out"
        )
    return coefficient * found if coefficient else None


def _divisor(items: int | Tensor, logits: Tensor) -> int | Tensor:
    """The number of items, or 1 where it is 0: the sum of losses is 0 then."""
    if not isinstance(items, Tensor):
        return items or 1
    if items.dim():
        raise ValueError(
            f"expected num_items_in_batch of 0 dimensions, got shape {list(items.shape)}, which "
            "the Trainer makes where one process drives several GPUs (DataParallel); start one "
            "process for each GPU (torchrun), or set CUDA_VISIBLE_DEVICES to one"
        )
    return torch.where(items > 0, items, 1).to(logits.device)


def _of_each(expected: Any, divisor: int | Tensor, logits: Tensor) -> Any:
    """The expected gradient of each token's loss: autograd divides by the divisor too.

    What :func:`sft_loss` refuses, or takes for False, is returned as it is.
    """
    if isinstance(expected, (bool, int, float)) and 0 < abs(expected) < float("inf"):
        expected = logits.new_full((), float(expected), dtype=torch.float32)
    return expected / divisor if isinstance(expected, Tensor) else expected

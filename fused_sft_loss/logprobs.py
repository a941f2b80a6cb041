"""token_logprobs: log-probabilities of the labels and entropies of the predictions."""

import torch.distributed as dist
from torch import Tensor

from . import temperature as temperatures
from .api import prepared
from .logprob_operators import differentiable_logprobs
from .options import Options


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_entropy: bool = False,
    shift: bool = Options.shift,
    layout: str = Options.layout,
    cu_seqlens: Tensor | None = Options.cu_seqlens,
    ignore_index: int = Options.ignore_index,
    vocab_size: int | None = Options.vocab_size,
    tp_group: "dist.ProcessGroup | None" = Options.tp_group,
    vocab_start: int | None = Options.vocab_start,
    inplace_backward: bool = Options.inplace_backward,
    backend: str | None = Options.backend,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of the labels, for reinforcement learning and distillation.

    Without options, and for an unsharded vocabulary, it equals the following, without the copies::

        z = logits[:, :-1].float() / temperature
        log_p = z.log_softmax(-1)
        logprobs = log_p.gather(-1, labels[:, 1:, None]).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)

    With p = softmax(z) and H = -sum(p * log(p)), the gradients are d(log(p[y]))/dz = onehot(y) - p
    and dH/dz = -p * (log(p) + H), divided by the temperature. Forward reads the logits once and
    takes one all-gather, backward reads them once for both gradients. Everything is computed in
    fp32. The gradient is rounded once, to the dtype of the logits.

    Args:
        logits, labels, shift, layout, cu_seqlens, ignore_index, vocab_size, tp_group, vocab_start,
            inplace_backward, backend: as in :func:`sft_loss`.
        loss_mask: bool, integer or float, not negative, in the labels' shape. It says which label
            tokens are scored. It selects them and does not weigh them.
        temperature: the logits are divided by it: a positive number, or a tensor that is 0-d or in
            the labels' shape. Like the mask it belongs to the label tokens: with `shift`, row t is
            divided by ``temperature[t + 1]``. At tokens that are not scored it is ignored. It gets
            no gradient. None: 1. One per token takes the kernels of the entropy, also without it.
        return_entropy: True: return the entropies too. Both results have a gradient; detach() an
            entropy that is only reported, and backward takes the kernel without it.

    Returns:
        The log-probabilities, fp32, in the labels' shape, at the places where ``sft_loss`` with
        ``reduction="none"`` has its losses, and exactly 0 for tokens that are not scored. With
        `return_entropy` a pair: the log-probabilities, and the entropies in nats.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`sft_loss`. A temperature that is not
            positive is an error where label values are checked. Without that check it makes the
            results of its token NaN.
    """
    options = Options(
        shift=shift,
        layout=layout,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        logit_scale=temperatures.logit_scale(temperature),
        vocab_size=vocab_size,
        tp_group=tp_group,
        vocab_start=vocab_start,
        inplace_backward=inplace_backward,
        backend=backend,
    )

    def check(labels: Tensor) -> None:
        if not isinstance(return_entropy, bool):
            raise TypeError(f"expected return_entropy True or False, got {return_entropy!r}")
        temperatures.check(temperature, labels)

    name = f"token_logprobs, return_entropy={return_entropy}"
    if temperatures.of_tokens(temperature):
        name += ", temperature of tokens"
    call = prepared(logits, labels, loss_mask, options, name, check_more=check)
    log_probs, entropies, *_ = differentiable_logprobs(
        call.logits,
        call.scoring,
        call.math,
        temperatures.of_rows(temperature, call.scoring.labels, shift),
        return_entropy,
        call.name,
        call.group_name,
        call.backend,
        inplace_backward,
    )
    log_probs = log_probs.view(labels.shape)
    return (log_probs, entropies.view(labels.shape)) if return_entropy else log_probs

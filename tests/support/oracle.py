"""The loss and its gradient in float64, row by row from the definitions; slow and simple.

It shares no code with the package. Autograd over the definition gives the gradient, so no formula
is used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Expected:
    losses: Tensor  # [N] float64: weight * loss
    weight: Tensor  # [N] float64
    grad: Tensor | None  # [N, v] float64, of sum(upstream * losses)
    log_prob: Tensor
    lse: Tensor
    correct: Tensor
    entropy: Tensor

    def reduce(self, reduction: str) -> Tensor:
        if reduction == "none":
            return self.losses
        total = self.losses.sum()
        if reduction == "sum":
            return total
        return total / self.weight.sum() if self.weight.sum() > 0 else total * 0


def scored_on(labels, loss_mask, shift, cu_seqlens, ignore_index):
    """(target, weight) per row, found by walking the positions one at a time; labels `[b, s]`."""
    batch, seq = labels.shape
    document = None
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        document = [sum(p >= edge for edge in bounds) for p in range(batch * seq)]
    target, weight = [], []
    for b in range(batch):
        for t in range(seq):
            at = t + 1 if shift else t
            here = b * seq + t
            usable = at < seq
            if usable and document is not None:
                inside = 0 < document[here] < len(bounds)
                usable = inside and document[here] == document[here + 1]
            label = int(labels[b, at]) if usable else ignore_index
            w = 1.0 if loss_mask is None else float(loss_mask[b, at]) if usable else 0.0
            counts = usable and label != ignore_index and w != 0
            target.append(label if counts else -1)
            weight.append(w if counts else 0.0)
    return target, torch.tensor(weight, dtype=torch.float64)


def transform(x: Tensor, softcap, logit_scale) -> Tensor:
    scaled = x * logit_scale
    if not softcap:
        return scaled
    return torch.where(x.isinf(), x, softcap * torch.tanh(scaled / softcap))


def evaluate(
    logits: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None = None,
    *,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    upstream: Tensor | None = None,
) -> Expected:
    """All results for unsharded logits `[b, s, v]`; `upstream` `[N]` multiplies each row's loss."""
    v = logits.shape[-1]
    size = v if vocab_size is None else vocab_size
    target, weight = scored_on(labels, loss_mask, shift, cu_seqlens, ignore_index)
    leaf = logits.detach().double().reshape(-1, v).clone().requires_grad_()
    losses, log_prob, lse_all, correct, entropy = [], [], [], [], []
    zero = torch.zeros((), dtype=torch.float64)
    for n, y in enumerate(target):
        if weight[n] == 0:  # never read, so a masked row cannot affect the result
            for out in (losses, log_prob, lse_all, entropy):
                out.append(zero)
            correct.append(False)
            continue
        z = transform(leaf[n, :size], softcap, logit_scale)
        lse = torch.logsumexp(z, 0)
        loss = (1 - label_smoothing) * (lse - z[y])
        if label_smoothing:
            loss = loss + label_smoothing * (lse - z.mean())
        losses.append(weight[n] * (loss + z_loss * lse**2))
        log_prob.append(z[y].detach() - lse.detach())
        lse_all.append(lse.detach())
        p = torch.softmax(z.detach(), 0)
        entropy.append(-torch.special.xlogy(p, p).sum())
        correct.append(int(z.detach().argmax()) == y)
    stacked = torch.stack(losses)
    grad = None
    if stacked.requires_grad:
        rows_upstream = torch.ones_like(weight) if upstream is None else upstream.double()
        (grad,) = torch.autograd.grad((stacked * rows_upstream).sum(), leaf)
    return Expected(
        stacked.detach(),
        weight,
        torch.zeros_like(leaf) if grad is None else grad,
        torch.stack(log_prob),
        torch.stack(lse_all),
        torch.tensor(correct),
        torch.stack(entropy),
    )

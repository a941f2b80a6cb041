"""Small problems for the tests of peers' bugs."""

import torch

import fused_sft_loss as fsl

INF, NAN = float("inf"), float("nan")


def grad_of(logits, labels, mask=None, *, backend, upstream=None, **options):
    """(loss, gradient) for a leaf copy of the logits."""
    leaf = logits.clone().requires_grad_()
    loss = fsl.sft_loss(leaf, labels, mask, backend=backend, **options)
    loss.backward(upstream)
    return loss.detach(), leaf.grad


def problem(b=2, s=5, v=1000, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(b, s, v, generator=g) * 3).to(dtype)
    return (
        logits,
        torch.randint(0, v, (b, s), generator=g),
        (torch.rand(b, s, generator=g) < 0.7).float(),
    )

"""Calls of the loss on the shards of a vocabulary, in the ranks of bench.ranks.run_ranks."""

from typing import NamedTuple

import torch.distributed as dist
from backends import using
from collectives import count_collectives
from torch import Tensor

import fused_sft_loss as fsl

OPTIONS = [
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-3},
    {"softcap": 5.0, "logit_scale": 1.5},
    {"vocab_size": 997, "label_smoothing": 0.2},
    {"shift": False},
]


class Sharded(NamedTuple):
    """What a rank got, on the CPU; and the collectives that it started."""

    losses: Tensor
    grad: Tensor
    metrics: tuple
    forward: list
    backward: list


def shard(full, starts, rank, options):
    """This rank's columns, and the options that place them."""
    edges = [*starts, full.shape[-1]]
    part = full[..., edges[rank] : edges[rank + 1]]
    widths = {b - a for a, b in zip(edges, edges[1:], strict=False)}
    placed = {} if len(widths) == 1 else {"vocab_start": starts[rank]}
    size = options.get("vocab_size", full.shape[-1])
    return part, {**options, **placed, "vocab_size": size, "tp_group": dist.group.WORLD}


def run_jobs(jobs, device="cpu"):
    """A Sharded for each job (name of a backend, case, first columns of the ranks, options)."""
    rank, results = dist.get_rank(), []
    calls = count_collectives()
    for name, case, starts, options in jobs:
        labels = case.labels.to(device)
        mask = None if case.loss_mask is None else case.loss_mask.to(device)
        with using(name) as backend:
            part, placed = shard(case.full(), starts, rank, options)
            leaf = part.to(device, copy=True).requires_grad_()
            calls.clear()
            losses = fsl.sft_loss(leaf, labels, mask, reduction="none", backend=backend, **placed)
            forward = list(calls)
            losses.sum().backward()
            backward = calls[len(forward) :]
            metrics = fsl.token_metrics(leaf.detach(), labels, mask, backend=backend, **placed)
        metrics = tuple(metric.cpu() for metric in metrics)
        results.append(Sharded(losses.detach().cpu(), leaf.grad.cpu(), metrics, forward, backward))
    return results

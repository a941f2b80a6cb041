"""reduction="sample_mean": weights by which every sample counts alike, however long it is.

The weight of a token becomes w / W, where W is the sum of w over its sample; the sum of weights
becomes S, the number of samples with W > 0. The mean of these targets is the mean over the samples
of sum(w * loss) / W, so no kernel knows of samples.

A sample is a document of `cu_seqlens`, else a row of the batch; labels `[n]` without `cu_seqlens`
are one sample. Nothing here is read by the host, and no sum uses atomics.
"""

import torch
from torch import Tensor

from .options import expect
from .targets import NOT_SCORED, Targets, boundaries

#: The reductions of a loss. The kernels know the first three.
REDUCTIONS = ("mean", "sum", "none", "sample_mean")


def of_kernels(reduction: str) -> tuple[str, bool]:
    """(the reduction of the kernels, per_sample of :class:`.Scoring`) for one of REDUCTIONS."""
    expect(reduction in REDUCTIONS, f"reduction in {REDUCTIONS}", reduction)
    per_sample = reduction == "sample_mean"
    return "mean" if per_sample else reduction, per_sample


def weighed_alike(targets: Targets, labels: Tensor, cu_seqlens: Tensor | None) -> Targets:
    """The targets with the weights w / W and the sum of weights S.

    Rows outside all documents are not scored. With shift=True they are not anyway.
    """
    weight = targets.weight.view(labels.shape)
    sums = totals(weight, cu_seqlens)
    weight = shares(weight, sums, cu_seqlens).flatten()
    scored = weight != 0
    return Targets(
        torch.where(scored, targets.target, NOT_SCORED),
        weight,
        scored.sum(dtype=torch.int32),
        scored_samples(sums).float(),
    )


def totals(weight: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """W of each sample, float64, of weights `[b, s]` or `[n]`.

    There is one for each row of the batch, or for each pair of neighbours in `cu_seqlens`.
    """
    weight = weight.double()
    if cu_seqlens is None:
        return weight.view(-1, weight.shape[-1]).sum(-1)
    # One block of a GPU adds up one segment, in a fixed order. The kernel would read out of bounds.
    bounds = boundaries(cu_seqlens).clamp(0, weight.numel())
    return torch.segment_reduce(weight.flatten(), "sum", offsets=bounds, initial=0, unsafe=True)


def shares(weight: Tensor, sums: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """w / W in fp32, in the weights' shape; 0 outside all samples and where W is 0.

    A NaN is kept, so that it reaches the loss.
    """
    if cu_seqlens is None:
        of_token = sums.view(*weight.shape[:-1], 1)
    else:
        position = torch.arange(weight.numel(), dtype=torch.int64, device=weight.device)
        sample = torch.searchsorted(boundaries(cu_seqlens), position, right=True)
        outside = sums.new_zeros(1)  # before the first boundary, and after the last one
        of_token = torch.cat([outside, sums, outside])[sample].view(weight.shape)
    return torch.where(of_token != 0, weight / of_token, 0.0).float()


def scored_samples(sums: Tensor) -> Tensor:
    """S, 0-d int32."""
    return (sums != 0).sum(dtype=torch.int32)

"""Which sample each row belongs to, and the mean over samples, in float64 and one row at a time."""

import torch


def sample_of(labels, cu_seqlens=None):
    """The sample of each row of labels `[b, s]` or `[n]`, None outside all documents.

    The boundaries end before the first one that decreases.
    """
    if cu_seqlens is None:
        seq = labels.shape[-1]
        return [row // seq for row in range(labels.numel())]
    bounds = cu_seqlens.tolist()
    end = next((i for i in range(1, len(bounds)) if bounds[i] < bounds[i - 1]), len(bounds))
    documents = list(zip(bounds[:end], bounds[1:end], strict=False))
    return [
        next((i for i, (a, b) in enumerate(documents) if a <= row < b), None)
        for row in range(labels.numel())
    ]


def row_factors(weight, samples):
    """`[N]` float64: what each row's weight * loss is multiplied by in the mean over samples."""
    totals = {}
    for w, sample in zip(weight.tolist(), samples, strict=True):
        if sample is not None:
            totals[sample] = totals.get(sample, 0.0) + w
    scored = {sample: total for sample, total in totals.items() if total > 0}
    factors = [1 / scored[s] / len(scored) if s in scored else 0.0 for s in samples]
    return torch.tensor(factors, dtype=torch.float64)

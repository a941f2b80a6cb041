"""Promise: document boundaries may end in sentinels, begin late or end early."""

import pytest
import torch

import fused_sft_loss as fsl
from fused_sft_loss import scoring
from fused_sft_loss.megatron import shift_packed_targets

LOGITS = torch.randn(2, 6, 50)
LABELS = torch.randint(0, 50, (2, 6))
#: Boundaries, and the same boundaries without their tail.
TAILS = {
    "-1": ([0, 4, 9, 12, -1, -1, -1], [0, 4, 9, 12]),
    "0": ([0, 4, 9, 12, 0, 0], [0, 4, 9, 12]),
    "one": ([0, 12, -1], [0, 12]),
    "repeated": ([0, 4, 4, 9, 9, 9, -1], [0, 4, 9]),
    "repeated end": ([0, 4, 12, 12, 12, 12], [0, 4, 12]),
    "late and early": ([2, 5, 10, -1, -1], [2, 5, 10]),
    "nothing": ([3, 3, -1], [3, 3]),
}


def losses(bounds, backend):
    return fsl.sft_loss(
        LOGITS, LABELS, cu_seqlens=torch.tensor(bounds), reduction="none", backend=backend
    )


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("name", TAILS)
def test_trap_a_sentinel_tail_ends_the_boundaries(backend, name, checked, monkeypatch):
    """`checked` False: as on an accelerator, where no value is read on the host."""
    monkeypatch.setattr(scoring, "may_synchronise", lambda tensor: checked)
    whole, cut = TAILS[name]
    got = losses(whole, backend)
    assert torch.equal(got, losses(cut, backend))
    inside = torch.tensor(
        [
            p % 6 < 5 and any(a <= p and p + 1 < b for a, b in zip(cut, cut[1:], strict=False))
            for p in range(12)
        ]
    )
    assert torch.equal(got.flatten() != 0, inside)


@pytest.mark.parametrize("name", TAILS)
def test_shift_targets_ends_them_alike(name):
    whole, cut = (torch.tensor(bounds, dtype=torch.int32) for bounds in TAILS[name])
    for shift in (fsl.shift_targets, lambda y, b: shift_packed_targets(y, cu_seqlens=b)):
        arguments = (None,) if shift is fsl.shift_targets else ()
        for got, want in zip(
            shift(LABELS, *arguments, whole), shift(LABELS, *arguments, cut), strict=True
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 7, 5],
        [0, 7, 5, 9],
        [0, 7, -1, 0],
        [0, 7, 0, 9],
        [-1, 7],
        [0, 13],
        [0, 13, -1],
        [0, 7, -2],
    ],
    ids=str,
)
def test_boundaries_that_are_none_are_an_error_on_a_cpu(backend, bounds):
    with pytest.raises(ValueError, match="expected cu_seqlens increasing within"):
        losses(bounds, backend)

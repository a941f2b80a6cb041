"""Promise: eager's Python steps follow the number of tiles, not the runs of scored rows."""

from unittest import mock

import pytest
import torch

import fused_sft_loss as fsl
from bench.memory import MemoryRecord
from fused_sft_loss.backends import eager

ROWS, COLUMNS = 20_000, 16


def masks():
    position = torch.arange(ROWS)
    return {
        "alternating": position % 2,
        "two of three": position % 3 != 0,
        "single rows far apart": position % 997 == 0,
        "a run over two sequences": (position > 8_000) & (position < 13_000),
        "all": position >= 0,
    }


@pytest.mark.parametrize("kind", masks())
def test_trap_a_step_for_every_run_of_scored_rows(kind):
    mask = masks()[kind].view(2, -1)
    logits = torch.randn(2, ROWS // 2, COLUMNS).bfloat16().requires_grad_()
    labels = torch.randint(0, COLUMNS, mask.shape)
    height, _ = eager.tile_shape(COLUMNS, logits.device)
    with mock.patch.object(eager, "load", wraps=eager.load) as load:
        losses = fsl.sft_loss(logits, labels, mask, shift=False, reduction="none", backend="eager")
        (grad,) = torch.autograd.grad(losses.sum(), logits)
    # Per pass: the tiles, one more for each of two sequences, and one load for the targets.
    assert load.call_count <= 2 * (-(-int(mask.sum()) // height) + 2 + 1)
    rows = logits.detach().double().flatten(0, 1).requires_grad_()
    want = torch.nn.functional.cross_entropy(rows, labels.flatten(), reduction="none")
    want = want * mask.flatten()
    torch.testing.assert_close(losses.flatten().double(), want, rtol=1e-6, atol=1e-6)
    (want_grad,) = torch.autograd.grad(want.sum(), rows)
    assert (grad[mask == 0] == 0).all()
    torch.testing.assert_close(grad.flatten(0, 1).double(), want_grad, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 2**20), (2, 2048, 2048), (512, 8, 1024)])
def test_scattered_rows_stay_within_the_scratch(shape):
    """A tile of rows that are not adjacent is a copy, which counts as scratch."""
    b, s, v = shape
    logits = torch.randn(shape).bfloat16().requires_grad_()
    labels, mask = torch.randint(0, v, (b, s)), (torch.arange(b * s) % 2).view(b, s)
    options = {"softcap": 30.0, "label_smoothing": 0.1, "shift": False, "backend": "eager"}
    with MemoryRecord() as record:
        record.mark("begin")
        loss = fsl.sft_loss(logits, labels, mask, **options)
        record.mark("forward")
        (grad,) = torch.autograd.grad(loss, logits)
        record.mark("backward")
    gradient = grad.numel() * 2
    del grad
    assert record.usage("begin", "forward").peak < 64 * 2**20
    assert record.usage("forward", "backward").peak - gradient < 64 * 2**20

"""The sizes of tiles and chunks, and sums that the first chunk writes."""

import pytest
import torch

import fused_sft_loss as fsl
from bench.memory import peak_memory
from fused_sft_loss.linear import tiles

H, V = 16, 60_000


def inputs(rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, rows, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (1, rows), generator=generator)


def test_trap_a_large_chunk_of_two_passes_leaves_the_cache():
    """chunk_rows=128 of 131072 columns are 64 MiB. Such tiles take up to 1.2 times as long on a CPU
    as tiles of 4 MiB, and more memory."""
    hidden, weight, labels = inputs(128)
    with torch.no_grad():
        usage = peak_memory(lambda: fsl.linear_sft_loss(hidden, weight, labels, chunk_rows=128))
    assert 2**22 <= usage.peak < 2**22 + 2**19 < 128 * V * 4


def test_trap_a_chunk_of_one_pass_has_few_rows():
    """4 MiB are 8 rows of 131072 columns. Each chunk converts the whole weight twice and adds to
    the whole sum, and chunks of 32 rows took twice as long as the products."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.empty(0, dtype=dtype)
        assert tiles.size_of(None, 131072, hidden, one_pass=True) // 131072 >= 256
        assert tiles.size_of(128, 131072, hidden, one_pass=True) == 128 * 131072
        assert tiles.size_of(1, 131072, hidden) == 131072  # fewer than the budget, if asked for


@pytest.mark.parametrize("rows, chunk_rows", [(1, 4), (3, 4), (9, 4), (9, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_written_before_they_are_added_to(dtype, rows, chunk_rows):
    """Uninitialised memory is NaN here, so a sum that is not written first shows. One row has no
    scored row."""
    hidden, weight, labels = inputs(rows, dtype)
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for one_pass in (True, False):
            loss = fsl.linear_sft_loss(
                hidden, weight, labels, chunk_rows=chunk_rows, grad_in_forward=one_pass
            )
            found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    finally:
        torch.use_deterministic_algorithms(False)
    rounding = 1e-5 if dtype == torch.float32 else 2**-7
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=rounding, atol=1e-7)

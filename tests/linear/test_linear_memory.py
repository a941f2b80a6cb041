"""Promise: beyond inputs and gradients, memory holds the parts that the docstring lists, no more.

The formulas are exact but for vectors of N rows. No part has the size of the logits.
"""

from unittest import mock

import pytest
import torch
from linear_cases import DTYPES

import fused_sft_loss as fsl
from bench.memory import MemoryRecord
from fused_sft_loss.linear import products, tiles

N, H, V = 96, 48, 9000
VECTORS = 4096 + 96 * N  # bytes: targets, weights, positions, normalizers, factors of N rows
FP32 = 4
rows_scored = pytest.mark.parametrize("scored", [N, 30])
chunks = pytest.mark.parametrize("chunk_rows", [1, 7, N])


def measured(dtype, scored, **options):
    """Bytes beyond the inputs: forward's peak, held after it, backward's peak without gradients."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, N, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (1, N), generator=generator)
    labels[0, torch.randperm(N, generator=generator)[scored:]] = -100
    with MemoryRecord() as record:
        record.mark("begin")
        loss = fsl.linear_sft_loss(hidden, weight, labels, shift=False, **options)
        record.mark("forward")
        grads = torch.autograd.grad(loss, (hidden, weight))
        record.mark("backward")
    size = sum(grad.numel() * grad.itemsize for grad in grads)
    forward = record.usage("begin", "forward")
    backward = record.usage("forward", "backward", base="begin")
    return forward.peak, forward.held, backward.peak - size


def assert_bytes(got, formula):
    assert formula <= got <= formula + VECTORS, (got - formula, VECTORS)


@rows_scored
@chunks
@pytest.mark.parametrize("wide", [False, True], ids=["fp32 products", "16-bit products"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_passes(dtype, wide, chunk_rows, scored):
    with mock.patch.object(products, "_cpu_multiplies", lambda dtype: wide):
        forward, held, backward = measured(dtype, scored, chunk_rows=chunk_rows)
        probe = torch.empty(0, dtype=dtype)
        product = products.dtype_of_products(probe).itemsize
    converts = product != dtype.itemsize
    tiling = tiles.Tiling.of(chunk_rows * V, scored, V, 4096 if converts else V)
    tile = tiling.rows * tiling.columns * product
    converted = tiling.columns * H * FP32 if converts else 0
    sums = 0 if tiling.whole_height and not converts else tiling.columns * H * FP32
    if wide and dtype != torch.float32 and not tiling.whole_height:
        return  # PyTorch on a CPU converts factors to add up in fp32: see products.accumulate
    statistics = tiling.tiles_per_row * scored * 3 * FP32
    assert tiling.rows * tiling.columns <= chunk_rows * V
    assert_bytes(forward, tile + scored * H * product + converted + statistics)
    assert_bytes(held, 0)
    if wide and dtype != torch.float32:
        return
    assert_bytes(backward, tile + scored * H * (product + FP32) + converted + sums)


@rows_scored
@chunks
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass(dtype, chunk_rows, scored):
    forward, held, backward = measured(dtype, scored, chunk_rows=chunk_rows, grad_in_forward=True)
    if products.dtype_of_products(torch.empty(0, dtype=dtype)) != torch.float32:
        pytest.skip("PyTorch on a CPU converts 16-bit factors to add up in fp32")
    chunk = min(chunk_rows, scored)
    converted = 0 if dtype == torch.float32 else 4096 * H * FP32
    of_hidden = scored * H * (FP32 if dtype == torch.float16 else dtype.itemsize)
    kept = V * H * FP32 + of_hidden
    assert_bytes(forward, kept + chunk * (V + 2 * H) * FP32 + converted)
    assert_bytes(held, kept)
    assert_bytes(backward, kept + converted)


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_few_rows_make_wide_tiles(dtype, one_pass):
    """With 2 scored rows a tile of 4 MiB has all columns. A copy of the weight in fp32 would be
    many times as large as that tile."""
    hidden = torch.randn(1, 2, 256).to(dtype)
    weight = torch.randn(2**16, 256).to(dtype)
    labels = torch.randint(0, 2**16, (1, 2))
    hidden.requires_grad_()
    with MemoryRecord() as record:
        record.mark("begin")
        loss = fsl.linear_sft_loss(hidden, weight, labels, shift=False, grad_in_forward=one_pass)
        torch.autograd.grad(loss, hidden)
        record.mark("end")
    assert record.usage("begin", "end").peak <= (4 << 20) + 4096 * 256 * FP32 + 2**16


def test_a_tile_has_at_most_the_bytes_of_its_budget():
    for columns in (1, 100, 50_000, 151_936, 2**23):
        for dtype in DTYPES:
            hidden = torch.empty(0, dtype=dtype)
            size = tiles.size_of(None, columns, hidden)
            item = products.dtype_of_products(hidden).itemsize
            for rows in (1, 3, 1000, 8192):
                tiling = tiles.Tiling.of(size, rows, columns, columns)
                assert 0 < tiling.rows * tiling.columns * item <= 4 << 20
                assert sum(s.stop - s.start for s in tiling.columns_of_tiles()) == columns
                assert sum(s.stop - s.start for s in tiling.rows_of_tiles()) == rows

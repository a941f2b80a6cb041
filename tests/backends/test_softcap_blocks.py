"""Blocks of softcapped logits on a CPU. The largest logit of a block decides its formula."""

import pytest
import torch
from backends import ON_CPU, using
from capped import RELATIVE

from fused_sft_loss.backends import selection
from fused_sft_loss.backends.contract import RowFactor
from fused_sft_loss.rowmath import RowMath

NATIVE = [name for name in ON_CPU if name.startswith("cpu-")]
pytestmark = pytest.mark.skipif(not NATIVE, reason="the native module is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COLUMNS = 1100  # a block, part of another, and a remainder
LARGEST = [0.05, 0.2, 0.21, 0.4, 0.41, 0.62, 0.63, 0.84, 0.86, 1.28, 1.3, 3.0, 12.0]  # / cap


def row_stats(rows, math, backend, count=4):
    kernels = selection.load(backend)
    target, weight = torch.zeros(len(rows), dtype=torch.int64), torch.ones(len(rows))
    return kernels.row_stats(rows[None], target, weight, math, count)


def capped(rows, math):
    return math.softcap * (rows.double() * math.logit_scale / math.softcap).tanh()


def assert_log_sum_exp(stats, z):
    got, want = stats[:, 0].double() + stats[:, 1].double().log(), z.logsumexp(1)
    size = 1 + want.abs()
    torch.testing.assert_close(got / size, want / size, rtol=0, atol=1e-6)


def assert_step(name, rows, math, bound=2e-6):
    """Loss and gradient of column 0 against float64, within the promised bounds."""
    target, weight = torch.zeros(len(rows), dtype=torch.int64), torch.ones(len(rows))
    leaf = rows.double().requires_grad_()
    z = torch.where(leaf.isinf(), leaf, capped(leaf, math))
    want = torch.logsumexp(z, 1) - z[:, 0]
    (slopes,) = torch.autograd.grad(want.sum(), leaf)
    with using(name) as backend:
        kernels, stats = selection.load(backend), row_stats(rows, math, backend, count=3)
        losses, normalizer = kernels.merge(stats[None], target, weight, math)
        grad = torch.empty_like(rows)
        kernels.row_grad(rows[None], normalizer, target, RowFactor(weight), math, grad[None])
    size = 1 + want + torch.logsumexp(z, 1).abs()
    torch.testing.assert_close(losses.double() / size, want / size, rtol=0, atol=1e-6)
    dtype = rows.dtype
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    slopes = slopes.nan_to_num(0)
    torch.testing.assert_close(
        grad.double(), slopes, rtol=rounding, atol=bound * slopes.abs().max().item() + smallest
    )


@pytest.mark.parametrize("cap", [1.0, 30.0, 42.0, 300.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_equal_logits_in_a_block(name, dtype, cap):
    """The sum of z in every formula, on both sides of every border between two of them."""
    rows = (torch.tensor(LARGEST + [-u for u in LARGEST])[:, None] * cap).to(dtype)
    rows = rows.expand(-1, COLUMNS).contiguous()
    math = RowMath(0, COLUMNS, softcap=cap, label_smoothing=0.1)
    with using(name) as backend:
        stats = row_stats(rows, math, backend)
    want = capped(rows, math)
    torch.testing.assert_close(stats[:, 0].double(), want[:, 0], rtol=RELATIVE, atol=0)
    torch.testing.assert_close(stats[:, 3].double(), want.sum(1), rtol=2 * RELATIVE, atol=0)
    assert_log_sum_exp(stats, want)


@pytest.mark.parametrize("name", NATIVE)
def test_the_gradient_of_a_sure_token_has_the_rounding_of_the_maximum(name):
    """The maximum is rounded down. To nearest, the sum would be corrected to 1 half the time."""
    top = torch.linspace(24, 36, 997)
    rows = torch.zeros(len(top), COLUMNS)
    rows[:, 700] = top
    assert_step(name, rows, RowMath(0, COLUMNS, softcap=42.0), bound=5e-7)


@pytest.mark.parametrize("name", NATIVE)
def test_a_nearly_sure_token_beside_large_logits(name):
    """Its block takes a higher degree than the token alone. The loss must not be negative."""
    top = torch.linspace(0.5, 29, 997)
    rows = torch.full((len(top), COLUMNS), -27.0)
    rows[:, :64] = -25.0  # the reference of the exponentials lies far below the maximum
    rows[::2, 700] = top[::2]
    rows[1::2, 1099] = top[1::2]  # the remainder of a row has no block
    math = RowMath(0, COLUMNS, softcap=30.0)
    with using(name) as backend:
        stats = row_stats(rows, math, backend, count=3)
    assert_log_sum_exp(stats, capped(rows, math))
    assert (stats[:, 1] >= 1).all()
    # Two degrees differ by up to 2e-7 of z, which is 29 here, and a sum below 1 is corrected to 1.
    assert_step(name, rows, math, bound=6e-6)


@pytest.mark.parametrize("cap", [30.0, 42.0, 50.0, 3000.0])
@pytest.mark.parametrize("std", [0.5, 2.0, 8.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_statistics_and_gradient_of_random_blocks(name, dtype, std, cap):
    """Caps above 43 take the rational function everywhere; its error is 4e-7 of z."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(4, 5000, generator=generator) * std).to(dtype)
    rows[1] += 40  # the reference lies away from 0
    rows[2] -= 40
    rows[3, 2500] = -torch.inf
    math = RowMath(0, 5000, softcap=cap)
    assert_step(name, rows, math, bound=2e-6 if cap < 100 else 1e-5)

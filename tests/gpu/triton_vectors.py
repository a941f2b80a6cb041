"""The Triton kernels over vectors of N rows, and the shared arithmetic.

Run by `test_triton_interpreted.py`, in Triton's interpreter.
"""

import pytest
import torch
import triton
import triton.language as tl
from capped import CAPS, assert_capped, assert_slope, logits_of_every_size
from fused_sft_loss.triton_kernels import arithmetic, merge
from fused_sft_loss.triton_kernels import row_targets as row_targets_kernel

from fused_sft_loss import shards, targets
from fused_sft_loss.backends import triton as kernels
from fused_sft_loss.rowmath import MOST_SMALL_CAP, RowMath
from fused_sft_loss.scoring import Scoring

INF, NAN = float("inf"), float("nan")


@triton.jit
def cast_kernel(x, narrowed, widened, N: tl.constexpr):
    at = tl.arange(0, N)
    value = arithmetic.narrow(tl.load(x + at), narrowed.dtype.element_ty)
    tl.store(narrowed + at, value)
    tl.store(widened + at, arithmetic.widen(tl.load(narrowed + at)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_nearest_even_and_back(dtype):
    """Every 16-bit number, and fp32 numbers around the middle between it and the next."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    bits = every.view(torch.int32)
    step = 1 << (16 if dtype == torch.bfloat16 else 13)
    near = torch.cat([bits + d for d in (0, 1, step // 2 - 1, step // 2, step // 2 + 1, step - 1)])
    x = torch.cat([near.view(torch.float32), torch.tensor([INF, -INF, NAN, 3.4e38, 1e-45])])
    x = torch.cat([x, torch.zeros(2**19 - x.numel())])
    narrowed, widened = torch.empty(2**19, dtype=dtype), torch.empty(2**19)
    cast_kernel[(1,)](x, narrowed, widened, N=2**19)
    want = x.to(dtype)
    assert torch.equal(narrowed.isnan(), want.isnan())
    kept = ~want.isnan()
    assert torch.equal(narrowed[kept].view(torch.int16), want[kept].view(torch.int16))
    assert torch.equal(widened[kept], want[kept].float())


@triton.jit
def cap_kernel(x, value, slope, inward, cap, SOFTCAP: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    z, dz = arithmetic.cap_and_slope(tl.load(x + at), inward, cap, SOFTCAP)
    tl.store(value + at, z)
    tl.store(slope + at, dz)


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("cap", CAPS)
def test_softcap_of_every_size_of_logit(cap, scale):
    x = logits_of_every_size(cap, 2**17)
    value, slope = torch.empty_like(x), torch.empty_like(x)
    math = RowMath(0, 1, softcap=cap, logit_scale=scale)
    cap_kernel[(1,)](x, value, slope, **arithmetic.cap_arguments(math), N=x.numel())
    assert_capped(value, x, math, cap * 2.0**-21 if cap <= MOST_SMALL_CAP else 0.0)
    assert_slope(slope, x, math)


LABELS = [torch.int64, torch.int32, torch.int16, torch.uint8]
MASKS = [None, torch.bool, torch.int64, torch.uint8, torch.float32, torch.float64, torch.bfloat16]


def label_problem(labels_dtype, mask_dtype, b=3, s=41):
    labels = torch.randint(0, 120, (b, s))
    labels[torch.rand(b, s) < 0.2] = 7  # ignore_index
    labels[0, :3] = torch.tensor([119, 100, 99])
    if labels_dtype not in (torch.uint8,):
        labels[1, :3] = torch.tensor([-1, -100, -2])
    labels = labels.to(labels_dtype)
    if mask_dtype is None:
        return labels, None
    keep = torch.rand(b, s) < 0.7
    mask = keep * torch.rand(b, s) if mask_dtype.is_floating_point else keep
    return labels, mask.to(mask_dtype)


def layouts(tensor):
    """The tensor contiguous, as a column slice, transposed, and one element into an allocation."""
    yield tensor
    yield torch.stack([tensor, tensor * 0], -1)[..., 0]
    yield tensor.t().contiguous().t()
    yield torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def check_targets(labels, mask, cuts, shift, ignore_index=7, vocab_size=100):
    got = kernels.row_targets(Scoring(labels, mask, cuts, shift, ignore_index), vocab_size)
    want = targets.row_targets(labels, mask, cuts, shift, ignore_index, vocab_size)
    for field, mine, wanted in zip(want._fields, got, want, strict=True):
        assert mine.dtype == wanted.dtype and mine.shape == wanted.shape, field
        if field == "weight_sum":
            torch.testing.assert_close(mine, wanted, rtol=3e-7, atol=0)
        else:
            assert torch.equal(mine, wanted), field


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("labels", LABELS, ids=str)
@pytest.mark.parametrize("block", [32, 4096])
def test_targets_of_every_dtype(monkeypatch, labels, mask, block):
    monkeypatch.setattr(row_targets_kernel, "BLOCK", block)  # many programs, or one
    labels, mask = label_problem(labels, mask)
    for shift in (True, False):
        check_targets(labels, mask, None, shift)
    check_targets(labels[0], None if mask is None else mask[0], None, True)


def test_targets_of_every_layout():
    labels, mask = label_problem(torch.int64, torch.float32)
    for strided, strided_mask in zip(layouts(labels), layouts(mask), strict=True):
        check_targets(strided, strided_mask, None, True)
        check_targets(strided, mask, None, False)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_documents(dtype):
    labels, mask = label_problem(torch.int64, torch.bool)
    n = labels.numel()
    for cuts in ([0, n], [0, 0, 5, 5, 40, 41, 42, n], [3, 70], list(range(n + 1)), [n, n], [0, 1]):
        cuts = torch.tensor(cuts, dtype=dtype)
        check_targets(labels, mask, cuts, True)
        check_targets(labels, None, torch.stack([cuts, cuts * 0], -1)[:, 0], True)


def test_a_million_rows(monkeypatch):
    monkeypatch.setattr(row_targets_kernel, "BLOCK", 2**17)  # few programs: each costs time
    n = 2**20 + 3
    labels, mask = torch.randint(0, 130, (n,)), torch.rand(n)
    check_targets(labels, mask, torch.arange(0, n, 1000), True)


def random_stats(ranks, rows, columns):
    stats = torch.rand(ranks, rows, columns) * 3
    stats[..., 0] = torch.randn(ranks, rows) * 20
    if columns > 4:
        stats[..., 4] = torch.arange(ranks)[:, None] * 10.0
        stats[0, 3:6, 0] = stats[-1, 3:6, 0]  # equal maxima: the smaller id wins
        stats[..., 5].neg_()
    stats[0, 0, :2] = torch.tensor([-INF, 0.0])  # a shard with only -inf
    stats[:, 1, 0], stats[:, 1, 1] = -INF, 0.0  # a row with only -inf
    stats[-1, 2, 1] = NAN
    return stats


@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "math", [RowMath(0, 90), RowMath(0, 90, label_smoothing=0.2, z_loss=1e-3)], ids=["plain", "all"]
)
def test_merge_of_shards(monkeypatch, math, ranks, block):
    monkeypatch.setattr(merge, "VECTOR_BLOCK", block)
    rows = 37
    weight = torch.rand(rows) + 0.5
    weight[5::4] = 0
    target = torch.randint(0, 2, (rows,)) * 10
    target[7], target[8] = targets.OUT_OF_VOCABULARY, targets.NOT_SCORED
    for columns in (4, 6) if math.label_smoothing else (3, 6):
        whole = random_stats(ranks, rows + 1, columns)
        for gathered in (whole[:, :-1], whole[:, 1:].contiguous()):
            got = kernels.merge(gathered, target, weight, math)
            want = shards.merge(gathered, target, weight, math)
            for mine, wanted in zip(got, want, strict=True):
                torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)
                assert (mine[weight == 0] == 0).all()
    got = kernels.merge_metrics(gathered, target, weight, math)
    want = shards.merge_metrics(gathered, target, weight, math)
    for mine, wanted in zip(got, want, strict=True):
        assert mine.dtype == wanted.dtype
        torch.testing.assert_close(mine, wanted, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_shards_are_merged_as_segments_are():
    """A vocabulary cut into two shards at a segment's end gives the same bits as one shard."""
    logits = torch.randn(1, 2, 4 * 1024) * 3
    target, weight = torch.tensor([5, 3000]), torch.ones(2)
    whole = kernels.row_stats(logits[..., :2048], target, weight, RowMath(0, 4096), 6)
    parts = torch.stack(
        [
            kernels.row_stats(logits[..., i : i + 1024], target, weight, RowMath(i, 4096), 6)
            for i in (0, 1024)
        ]
    )
    math = RowMath(0, 4096)
    for mine, wanted in zip(
        kernels.merge_metrics(parts, target, weight, math),
        kernels.merge_metrics(whole.unsqueeze(0), target, weight, math),
        strict=True,
    ):
        assert torch.equal(mine, wanted)

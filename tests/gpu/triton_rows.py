"""Splits, memory traffic, order and synchronisation of the Triton kernels.

Run by `test_triton_interpreted.py`, in Triton's interpreter.
"""

import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import build, run
from fused_sft_loss.triton_kernels import launch, row_grad, row_stats, tune
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import interpreter_builder
from wrong_calls import TABLE

import fused_sft_loss as fsl
from fused_sft_loss import scoring
from fused_sft_loss.backends import triton as kernels
from fused_sft_loss.backends.contract import RowFactor, normalizer_like
from fused_sft_loss.rowmath import RowMath
from fused_sft_loss.scoring import Scoring
from fused_sft_loss.targets import row_targets

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 9.0, "logit_scale": 1.5}]
MATH = RowMath(0, 3000, label_smoothing=0.1, z_loss=1e-3, logit_scale=1.5)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 512 columns, two per segment: 3000 columns are three segments, the last one cut."""
    shape = launch.Shape("interpreter", launch.USES, None, 64, 1, 1024, "for tests")
    monkeypatch.setattr(launch, "SHAPES", (shape,))


def rows_of(dtype, b=2, s=2, v=3000, padding=0):
    """(logits `[b, s, v + padding]`, target, weight); the second row is masked."""
    logits = (torch.randn(b, s, v + padding) * 3).to(dtype)
    weight = torch.rand(b * s) + 0.5
    weight[1] = 0
    return logits, torch.randint(0, v, (b * s,)), weight


@pytest.mark.parametrize("columns", [3, 4, 6])
@pytest.mark.parametrize("softcap", [0.0, 9.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_whatever_the_split(small_tiles, monkeypatch, dtype, softcap, columns):
    logits, target, weight = rows_of(dtype)
    logits[0, 0, :1024] = -float("inf")  # a whole segment
    math = MATH._replace(softcap=softcap)
    results = []
    for parts in (1, 2, 3):
        monkeypatch.setattr(row_stats, "splits", lambda *_, n=parts: n)
        monkeypatch.setattr(row_grad, "splits", lambda *_, n=parts: n)
        stats = kernels.row_stats(logits, target, weight, math, columns)
        grad = torch.empty_like(logits)
        kernels.row_grad(logits, stats[:, :2].contiguous(), target, RowFactor(weight), math, grad)
        results.append((stats, grad))
    assert results[0][0][:, 1].count_nonzero() == (weight != 0).sum()
    for stats, grad in results[1:]:
        assert torch.equal(stats, results[0][0]) and torch.equal(grad, results[0][1])


def test_few_rows_are_split_and_many_are_not():
    chip = launch.Chip("sm_90", 32, 132)
    assert launch.splits(chip, rows=64, segments=16) == 16
    assert launch.splits(chip, rows=2112, segments=16) == 2
    assert launch.splits(chip, rows=100_000, segments=16) == 1
    assert launch.splits(chip, rows=0, segments=0) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", ["bsv", "offset"])
def test_same_bits_whatever_the_dtype_and_the_alignment(small_tiles, dtype, view):
    case = build(view, dtype, 2, 3, 3000, 0, "float", OPTIONS[1])
    aligned = replace(case, view="bsv", storage=case.full().float().clone())
    assert launch.aligned(aligned.storage)
    assert launch.aligned(case.logits(case.storage)) == (view == "bsv")
    target, weight = torch.randint(0, 3000, (6,)), torch.ones(6)
    stats, wanted = (
        kernels.row_stats(one.logits(one.storage), target, weight, MATH, 6)
        for one in (case, aligned)
    )
    assert torch.equal(stats, wanted)
    losses, _ = run(case, "triton")
    wanted, _ = run(aligned, "triton")
    assert torch.equal(losses, wanted)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    "others", [[6], [512], [1024], [8], [2999], [513, 100, 2000]], ids=lambda others: str(others)
)
def test_of_equal_maxima_the_first_id_wins(small_tiles, monkeypatch, others, parts):
    """The other maximum is in the same run, the next tile, another segment or another thread."""
    monkeypatch.setattr(row_stats, "splits", lambda *_: parts)
    logits = torch.randn(1, 2, 3000).clamp_max(4)
    first = min(5, *others)
    logits[..., [5, *others]] = 5.0
    labels = torch.tensor([[first, others[0] if others[0] != first else 5]])
    metrics = fsl.token_metrics(logits, labels, shift=False, backend="triton")
    assert metrics.correct.tolist() == [[True, False]]


@contextmanager
def recorded_accesses():
    """Yield two lists: the addresses that kernels load and store, one array per call."""
    loads, stores = [], []

    def noting(method, notes):
        def noted(ptrs, *args):
            mask = args[0 if notes is loads else 1]
            notes.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].ravel())
            return method(ptrs, *args)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for name, notes in (("create_masked_load", loads), ("create_masked_store", stores)):
            method = getattr(interpreter_builder, name)
            patch.setattr(interpreter_builder, name, noting(method, notes), raising=False)
        yield loads, stores


def counts(accesses, tensor):
    """How often each element of a contiguous tensor was accessed, in the tensor's shape."""
    size = tensor.element_size()
    index = (np.concatenate(accesses).astype(np.int64) - tensor.data_ptr()) // size
    index = index[(index >= 0) & (index < tensor.numel())]
    return torch.from_numpy(np.bincount(index, minlength=tensor.numel())).view(tensor.shape)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scored_rows_are_read_once_and_masked_ones_never(small_tiles, monkeypatch, dtype, parts):
    monkeypatch.setattr(row_stats, "splits", lambda *_: parts)
    monkeypatch.setattr(row_grad, "splits", lambda *_: parts)
    logits, target, weight = rows_of(dtype, padding=7)
    grad = torch.full_like(logits, float("nan"))
    with recorded_accesses() as (loads, stores):
        stats = kernels.row_stats(logits, target, weight, MATH, 3)
    read = counts(loads, logits).flatten(0, 1)
    wanted = (weight != 0).long().unsqueeze(1).expand(-1, 3007).clone()
    wanted[:, 3000:] = 0  # padding
    wanted[torch.arange(4), target] *= 2  # the target's logit is read once more
    assert torch.equal(read, wanted)
    factor = weight.clone()
    factor[2] = 0  # the upstream gradient of row 2 is 0
    with recorded_accesses() as (loads, stores):
        kernels.row_grad(logits, stats[:, :2].contiguous(), target, RowFactor(factor), MATH, grad)
    wanted = (factor != 0).long().unsqueeze(1).expand(-1, 3007).clone()
    wanted[:, 3000:] = 0
    assert torch.equal(counts(loads, logits).flatten(0, 1), wanted)
    assert (counts(stores, grad) == 1).all()
    assert (grad.flatten(0, 1)[factor == 0] == 0).all() and (grad[..., 3000:] == 0).all()


def test_backward_begins_with_the_last_row(small_tiles):
    logits, target, weight = rows_of(torch.float32)
    grad = torch.empty_like(logits)
    with recorded_accesses() as (_, stores):
        kernels.row_grad(
            logits, normalizer_like(weight).fill_(1), target, RowFactor(weight), MATH, grad
        )
    rows = [(int(store[0]) - grad.data_ptr()) // (4 * 3000) for store in stores]
    assert rows == sorted(rows, reverse=True) and set(rows) == set(range(4))


class NoSynchronisation(TorchDispatchMode):
    """Fails on operators that make the host wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        assert name not in self.WAITING, f"{name} synchronises"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all"])
def test_kernels_do_not_synchronise(small_tiles, monkeypatch, options, parts):
    """A dispatch mode checks every torch operator between the kernels."""
    monkeypatch.setattr(row_stats, "splits", lambda *_: parts)
    case = build("bsv", torch.bfloat16, 2, 3, 3000, 0, "float", options)
    math = RowMath(0, 3000, **options)
    cuts = torch.tensor([0, 2, 6])
    with NoSynchronisation():
        rows = kernels.row_targets(Scoring(case.labels, case.loss_mask, cuts, True, -100), 3000)
        columns = 4 if math.label_smoothing else 3
        stats = kernels.row_stats(case.storage, rows.target, rows.weight, math, columns)
        _, normalizer = kernels.merge(stats.unsqueeze(0), rows.target, rows.weight, math)
        there = case.storage, normalizer, rows.target, RowFactor(rows.weight), math
        kernels.row_grad(*there, case.storage)
        stats = kernels.row_stats(case.storage, rows.target, rows.weight, math, 6)
        kernels.merge_metrics(stats.unsqueeze(0), rows.target, rows.weight, math)
        with pytest.raises(AssertionError, match="synchronises"):  # proves that the mode can fail
            bool(normalizer.sum() > 0)


def test_nothing_synchronises_from_end_to_end(monkeypatch):
    """Traps Tensor methods that synchronise, while the loss runs as on an accelerator."""
    monkeypatch.setattr(scoring, "may_synchronise", lambda tensor: False)

    def trap(name):
        original = getattr(torch.Tensor, name)

        def trapped(self, *args, **kwargs):
            caller = sys._getframe(1).f_globals["__name__"]
            # logit_scale is always on the CPU, so `rowmath` may read it.
            allowed = caller == "fused_sft_loss.rowmath" and self.device.type == "cpu"
            assert allowed or not caller.startswith("fused_sft_loss"), (
                f"{caller} calls Tensor.{name}"
            )
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, trapped)

    for name in ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        trap(name)
    case = build("bsv", torch.bfloat16, 2, 3, 1000, 0, "float", OPTIONS[1])
    options = {**case.options, "cu_seqlens": torch.tensor([0, 2, 6]), "backend": "triton"}
    leaf = case.storage.clone().requires_grad_()
    fsl.sft_loss(leaf, case.labels, case.loss_mask, **options).backward()
    fsl.token_metrics(leaf, case.labels, case.loss_mask, **options)
    monkeypatch.setattr(scoring, "may_synchronise", lambda tensor: True)
    with pytest.raises(AssertionError, match="calls Tensor"):  # proves that the traps can fail
        fsl.sft_loss(leaf, case.labels, case.loss_mask, **options)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all"])
def test_compiled_step_equals_the_eager_one(options, inplace):
    torch._dynamo.reset()
    case = build("bsv", torch.float32, 2, 5, 1000, 0, "float", options)

    def step(x, labels, mask):
        more = {"backend": "triton", "inplace_backward": inplace, **options}
        return fsl.sft_loss(x * 1.5, labels, mask, **more)

    eager, traced = (case.storage.clone().requires_grad_() for _ in range(2))
    want = step(eager, case.labels, case.loss_mask)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = compiled(traced, case.labels, case.loss_mask)
    want.backward()
    got.backward()
    assert torch.equal(got, want) and torch.equal(traced.grad, eager.grad)


@pytest.mark.parametrize("what", TABLE)
def test_wrong_use_is_the_same_error(what):
    logits, labels, mask, options, error, words = TABLE[what]
    with pytest.raises(error) as caught:
        fsl.sft_loss(logits, labels, mask, **{"backend": "triton", **options})
    assert all(word in str(caught.value) for word in words)


def test_search_leaves_logits_that_are_their_own_gradient_alone(small_tiles, monkeypatch):
    """FUSED_SFT_LOSS_AUTOTUNE runs a kernel many times. An in-place kernel may only run once."""
    logits, target, weight = rows_of(torch.float32)
    want = torch.empty_like(logits)
    kernels.row_grad(
        logits, normalizer_like(weight).fill_(9), target, RowFactor(weight), MATH, want
    )
    monkeypatch.setenv(tune.VARIABLE, "1")
    monkeypatch.setattr(tune, "_found", {})
    ran = []

    def search(chip, kernel, dtype, columns, run, **_):
        shape = launch.shape_for(chip, kernel, columns)
        run(shape)
        run(shape)
        ran.append(kernel)
        return shape

    monkeypatch.setattr(tune, "search", search)
    kernels.row_grad(
        logits, normalizer_like(weight).fill_(9), target, RowFactor(weight), MATH, logits
    )
    assert ran == ["row_grad"] and torch.equal(logits, want)


@pytest.mark.parametrize("empty", ["rows", "vocabulary of this shard"])
def test_nothing_to_do(empty):
    math = RowMath(100, 100 if empty != "rows" else 200)
    logits = torch.randn(2, 0 if empty == "rows" else 3, 50)
    rows = logits.shape[0] * logits.shape[1]
    target, weight = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    stats = kernels.row_stats(logits, target, weight, math, 6)
    assert (stats[:, 0] == -torch.inf).all() and (stats[:, 1:4] == 0).all()
    losses, _ = kernels.merge(stats.unsqueeze(0), target, weight, math)
    assert losses.shape == (rows,)
    grad = torch.full_like(logits, 7.0)
    kernels.row_grad(
        logits, normalizer_like(weight).fill_(1), target, RowFactor(weight), math, grad
    )
    assert (grad == 0).all()
    labels = torch.zeros(2, logits.shape[1], dtype=torch.int64)
    got = kernels.row_targets(Scoring(labels, None, None, True, -100), 9)
    for mine, wanted in zip(got, row_targets(labels, None, None, True, -100, 9), strict=True):
        assert torch.equal(mine, wanted)

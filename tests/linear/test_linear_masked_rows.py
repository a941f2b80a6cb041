"""Promise: only scored rows are multiplied, and an all-masked batch multiplies nothing."""

from contextlib import contextmanager

import pytest
import torch
from linear_cases import build

from fused_sft_loss.linear import products

both_schedules = pytest.mark.parametrize("one_pass", [False, True])


def operators(step):
    """Names of the aten operators that `step` runs, also inside other operators."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return {event.name.removeprefix("aten::") for event in profile.events()}


PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "matmul", "linear"}


def leaves(case):
    return [t.clone().requires_grad_() for t in (case.storage, case.weight, case.bias)]


@contextmanager
def multiplied(monkeypatch):
    """Records the size of every product of linear.products."""
    sizes = []
    for name, (first, second) in {"multiply": (0, 1), "accumulate": (1, 2)}.items():
        original = getattr(products, name)

        def noted(*args, _original=original, _first=first, _second=second):
            a, b = args[_first], args[_second]
            sizes.append((a.shape[0], b.shape[1], a.shape[1]))
            return _original(*args)

        monkeypatch.setattr(products, name, noted)
    yield sizes
    monkeypatch.undo()


@both_schedules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_all_masked_batch_multiplies_nothing(reduction, dtype, one_pass):
    case = build("bsv", dtype, 2, 6, 8, 1100, 0, "empty", {})
    given = leaves(case)
    losses = []

    def step():
        losses.append(case.call(*given, reduction=reduction, grad_in_forward=one_pass))
        losses[0].sum().backward()

    assert not operators(step) & PRODUCTS
    (loss,) = losses
    assert loss.requires_grad and not loss.count_nonzero()
    for leaf in given:
        assert leaf.grad.dtype == dtype and torch.equal(leaf.grad, torch.zeros_like(leaf))


@both_schedules
@pytest.mark.parametrize("padding", [{"rows": 7}, {"multiple": 4}], ids=str)
def test_an_all_masked_batch_has_gradient_0_with_padding_rows_too(padding, one_pass):
    case = build("bsv", torch.float32, 2, 6, 8, 1100, 0, "empty", {})
    given = leaves(case)
    loss = case.call(*given, grad_in_forward=one_pass, **padding)
    loss.backward()
    assert loss == 0
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in given)


def test_the_count_of_products_can_fail():
    case = build("bsv", torch.float32, 2, 6, 8, 100, 0, "none", {})
    assert operators(lambda: case.call(*leaves(case)).backward()) & PRODUCTS


@both_schedules
@pytest.mark.parametrize("padding", [{}, {"multiple": 8}, {"rows": 9}], ids=str)
def test_as_many_rows_are_multiplied_as_are_scored(padding, one_pass, monkeypatch):
    case = build("bsv", torch.float32, 2, 6, 8, 100, 0, "none", {"shift": False})
    case.labels.fill_(3)
    case.labels[0, :5] = -100  # 7 of 12 are scored
    rows = {"multiple": 8, "rows": 9}.get(next(iter(padding), ""), 7)
    with multiplied(monkeypatch) as sizes:
        case.call(*leaves(case), grad_in_forward=one_pass, **padding).backward()
    forward, to_hidden, to_weight = (rows, 100, 8), (rows, 8, 100), (100, 8, rows)
    again = [] if one_pass else [forward]
    assert sizes == [forward, *again, to_hidden, to_weight]


@both_schedules
@pytest.mark.parametrize("padding", [{}, {"rows": 12}, {"multiple": 12}], ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_trap_nan_in_the_hidden_states_of_masked_rows(poison, padding, one_pass):
    """Rows that only fill up the number of rows must not reach the weight as 0 * NaN."""
    case = build("bsv", torch.float32, 2, 6, 8, 1100, 7, "float", {})
    clean = leaves(case)
    case.call(*clean, grad_in_forward=one_pass, **padding).backward()
    scored = clean[0].grad.abs().sum(-1, keepdim=True) != 0
    poisoned = leaves(case)
    with torch.no_grad():
        poisoned[0].masked_fill_(~scored, poison)
    loss = case.call(*poisoned, grad_in_forward=one_pass, **padding)
    loss.backward()
    assert loss.isfinite()
    for got, want in zip(poisoned, clean, strict=True):
        assert torch.equal(got.grad, want.grad)


@both_schedules
def test_nan_in_a_scored_row_reaches_the_loss(one_pass):
    case = build("bsv", torch.float32, 1, 3, 8, 100, 7, "none", {"shift": False})
    case.labels.fill_(5)
    case.storage[0, 1, 2] = torch.nan
    losses = case.call(*leaves(case), reduction="none", grad_in_forward=one_pass)
    assert losses[0].isnan().tolist() == [False, True, False]


@both_schedules
def test_more_scored_rows_than_rows_allows(one_pass, monkeypatch):
    """On a CPU that is an error; where reading the number costs a wait, the loss is NaN."""
    case = build("bsv", torch.float32, 2, 6, 8, 100, 7, "none", {})
    with pytest.raises(ValueError, match="expected at most rows=3 scored tokens, got"):
        case.call(*leaves(case), rows=3, grad_in_forward=one_pass)
    monkeypatch.setattr("fused_sft_loss.linear.rows.may_synchronise", lambda tensor: False)
    for reduction in ("mean", "sum", "none"):
        loss = case.call(*leaves(case), rows=3, reduction=reduction, grad_in_forward=one_pass)
        assert loss.isnan().any()

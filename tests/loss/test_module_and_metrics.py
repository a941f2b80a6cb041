"""SFTLoss, token_metrics and shift_targets: the rest of the public surface."""

import dataclasses
import inspect

import pytest
import torch
from backends import ON_CPU, using
from cases import build, cases, expected
from closeness import PRODUCT
from hypothesis import given, settings

import fused_sft_loss as fsl
from fused_sft_loss import api
from fused_sft_loss.api import loss_terms, loss_terms_and_metrics
from fused_sft_loss.options import Options


@pytest.mark.parametrize("name", ON_CPU)
@settings(PRODUCT, max_examples=80)
@given(case=cases())
def test_metrics_agree_with_the_oracle(name, case):
    options = {**case.call_options()}
    mask = None if case.loss_mask is None else case.loss_mask != 0
    case.loss_mask = mask
    want = expected(case)
    with using(name) as backend:
        got = fsl.token_metrics(
            case.logits(case.storage), case.labels, mask, backend=backend, **options
        )
    size = 1 + want.lse.abs() + want.losses.abs()
    for field in ("log_prob", "lse", "entropy"):
        value, wanted = getattr(got, field), getattr(want, field)
        assert value.dtype == torch.float32 and value.shape == case.labels.shape
        torch.testing.assert_close(
            value.flatten().double() / size, wanted / size, rtol=0, atol=2e-6
        )
        assert (value.flatten()[want.weight == 0] == 0).all()
    torch.testing.assert_close(
        got.loss.flatten().double() / size, want.losses / size, rtol=0, atol=1e-6
    )
    assert torch.equal(got.correct.flatten(), want.correct)


@pytest.mark.parametrize("name", ON_CPU)
def test_metrics_are_detached_and_select_rather_than_weigh(name):
    case = build("bsv", torch.float32, 2, 6, 1000, 0, "float", {})
    leaf = case.storage.clone().requires_grad_()
    with using(name) as backend:
        weighted = fsl.token_metrics(leaf, case.labels, case.loss_mask, backend=backend)
        selected = fsl.token_metrics(leaf, case.labels, case.loss_mask != 0, backend=backend)
    assert not weighted.loss.requires_grad
    for a, b in zip(weighted, selected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ON_CPU)
def test_first_of_equal_maxima_is_the_prediction(name):
    logits = torch.zeros(1, 3, 9000)
    logits[..., 8500] = 2.0
    logits[..., 100] = 2.0
    labels = torch.tensor([[0, 100, 8500]])
    with using(name) as backend:
        correct = fsl.token_metrics(logits, labels, backend=backend).correct
    assert correct.tolist() == [[True, False, False]]


@pytest.mark.parametrize("name", ON_CPU)
def test_entropy_with_masked_out_vocabulary_is_finite(name):
    logits = torch.full((1, 2, 20000), -float("inf"))
    logits[..., [5, 12000]] = torch.tensor([1.0, 1.0])
    with using(name) as backend:
        got = fsl.token_metrics(logits, torch.tensor([[0, 5]]), backend=backend)
    torch.testing.assert_close(got.entropy[0, 0], torch.tensor(2.0).log())
    torch.testing.assert_close(got.log_prob[0, 0], -torch.tensor(2.0).log())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ON_CPU)
def test_losses_with_metrics_are_the_losses_and_the_metrics(name, inplace):
    """One read gives the bits of two reads, gradient included; the metrics have no graph."""
    case = build("sbv", torch.bfloat16, 2, 5, 300, 0, "float", {})
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "layout": "sbv", "vocab_size": 290}
    with using(name) as backend:
        options |= {"backend": backend, "inplace_backward": inplace}
        results = []
        for function in (loss_terms, loss_terms_and_metrics):
            leaf = case.storage.clone().requires_grad_()
            result = function(leaf * 1, case.labels % 290, case.loss_mask, Options(**options))
            terms, *metrics = (result,) if function is loss_terms else result
            terms.losses.backward(torch.rand_like(terms.losses).fill_(0.3))
            results.append([terms.losses, leaf.grad])
        options.pop("inplace_backward")
        wanted = fsl.token_metrics(case.storage, case.labels % 290, case.loss_mask, **options)
    assert all(map(torch.equal, *results))
    assert all(map(torch.equal, metrics[0], wanted))
    assert not any(figure.requires_grad for figure in metrics[0])


def test_module_is_the_function_with_its_options():
    case = build("bsv", torch.bfloat16, 2, 6, 1000, 0, "float", {})
    module = fsl.SFTLoss(label_smoothing=0.1, z_loss=1e-3, softcap=20.0, reduction="sum")
    want = fsl.sft_loss(
        case.storage,
        case.labels,
        case.loss_mask,
        label_smoothing=0.1,
        z_loss=1e-3,
        softcap=20.0,
        reduction="sum",
    )
    assert torch.equal(module(case.storage, case.labels, case.loss_mask), want)
    nothing = module(case.storage, case.labels, case.loss_mask, cu_seqlens=torch.tensor([0, 1]))
    assert nothing == 0 != want
    assert "label_smoothing=0.1" in repr(module) and "reduction='sum'" in repr(module)


def test_shift_targets_keeps_dtypes_and_its_inputs():
    labels = torch.arange(12, dtype=torch.int32).view(2, 6)
    mask = torch.rand(2, 6, dtype=torch.float16)
    kept = labels.clone(), mask.clone()
    shifted, shifted_mask = fsl.shift_targets(labels, mask)
    assert shifted.dtype == torch.int32 and shifted_mask.dtype == torch.float16
    assert torch.equal(shifted[:, :-1], labels[:, 1:]) and (shifted[:, -1] == -100).all()
    assert torch.equal(shifted_mask[:, :-1], mask[:, 1:]) and (shifted_mask[:, -1] == 0).all()
    assert torch.equal(labels, kept[0]) and torch.equal(mask, kept[1])
    assert fsl.shift_targets(labels)[1].dtype == torch.bool


def test_no_rows_and_one_row():
    empty = torch.empty(2, 0, 50, requires_grad=True)
    loss = fsl.sft_loss(empty, torch.empty(2, 0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and empty.grad.shape == (2, 0, 50)
    one = torch.randn(2, 1, 50, requires_grad=True)
    loss = fsl.sft_loss(one, torch.zeros(2, 1, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and (one.grad == 0).all()


def test_no_option_is_missing_from_sft_loss():
    """SFTLoss, token_metrics and Megatron's loss_func take their options from Options."""
    parameters = inspect.signature(fsl.sft_loss).parameters.values()
    written = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    of_module = inspect.signature(fsl.SFTLoss).parameters["reduction"].default
    assert written.pop("reduction") == of_module == "mean"
    assert written == {field.name: field.default for field in dataclasses.fields(Options)}


def test_sft_loss_passes_every_option_on(monkeypatch):
    class Reached(Exception):
        pass

    def prepared(logits, labels, loss_mask, options, *more):
        raise Reached(options)

    monkeypatch.setattr(api, "prepared", prepared)
    marks = {field.name: object() for field in dataclasses.fields(Options)}
    with pytest.raises(Reached) as reached:
        fsl.sft_loss(None, None, **marks)
    assert vars(reached.value.args[0]) == marks

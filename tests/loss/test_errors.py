"""Promise: wrong use is an error that says what was expected, what was passed, and the fix."""

import re

import pytest
import torch
from backends import BUILT, ON_CPU, using
from wrong_calls import LABELS, LOGITS, MASK, TABLE, changed

import fused_sft_loss as fsl


@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("what", TABLE)
def test_message_says_expected_got_and_fix(what, backend):
    logits, labels, mask, options, error, words = TABLE[what]
    with pytest.raises(error) as caught:
        fsl.sft_loss(logits, labels, mask, **{"backend": backend, **options})
    for word in words:
        assert word in str(caught.value), f"{word!r} not in {caught.value}"


@pytest.mark.parametrize("backend", ["triton", "cuda", "hip"])
def test_backend_that_cannot_run_names_one_that_can(backend):
    with pytest.raises(NotImplementedError, match=f"{backend}.*Here backend='(cpu|eager)' can"):
        fsl.sft_loss(LOGITS, LABELS, MASK, backend=backend)


def test_environment_variable_forces_a_backend_and_fails_loudly(monkeypatch):
    monkeypatch.setenv("FUSED_SFT_LOSS_BACKEND", "cuda")
    with pytest.raises(NotImplementedError, match="FUSED_SFT_LOSS_BACKEND=cuda"):
        fsl.sft_loss(LOGITS, LABELS, MASK)
    monkeypatch.setenv("FUSED_SFT_LOSS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FUSED_SFT_LOSS_BACKEND=nonsense"):
        fsl.sft_loss(LOGITS, LABELS, MASK)
    monkeypatch.setenv("FUSED_SFT_LOSS_BACKEND", "eager")
    forced = fsl.sft_loss(LOGITS, LABELS, MASK)
    assert torch.equal(forced, fsl.sft_loss(LOGITS, LABELS, MASK, backend="eager"))


@pytest.mark.parametrize("name", ON_CPU)
def test_without_the_value_check_a_wrong_label_poisons_its_row_alone(name, monkeypatch):
    """As on an accelerator, where reading a label on the host would synchronise."""
    monkeypatch.setattr("fused_sft_loss.scoring.may_synchronise", lambda tensor: False)
    leaf = LOGITS.clone().requires_grad_()
    labels = changed(LABELS, (1, 3), 100)
    with using(name) as backend:
        losses = fsl.sft_loss(leaf, labels, MASK, reduction="none", backend=backend)
        mean = fsl.sft_loss(leaf, labels, MASK, backend=backend)
        losses.sum().backward()
    assert losses.isnan().nonzero().tolist() == [[1, 2]] and mean.isnan()
    assert leaf.grad[1, 2].isnan().all() and leaf.grad.isnan().sum() == 100


def test_wrong_labels_under_the_mask_are_nobodys_business():
    labels = changed(changed(LABELS, (1, 3), 10**6), (0, 2), -5)
    mask = changed(changed(MASK, (1, 3), 0), (0, 2), 0)
    assert fsl.sft_loss(LOGITS, labels, mask).isfinite()


def test_module_checks_its_options_at_construction():
    with pytest.raises(ValueError, match="label_smoothing"):
        fsl.SFTLoss(label_smoothing=2.0)
    with pytest.raises(ValueError, match="reduction"):
        fsl.SFTLoss(reduction="median")
    with pytest.raises(TypeError, match="labelsmoothing"):
        fsl.SFTLoss(labelsmoothing=0.1)


def test_double_backward_is_refused():
    leaf = LOGITS.clone().requires_grad_()
    loss = fsl.sft_loss(leaf, LABELS, MASK)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=re.compile("autograd|differentiable|grad", re.I)):
        grad.sum().backward()

"""Promise: wrong use is an error that says what was expected, what came, and the fix."""

import re

import pytest
import torch
from backends import BUILT, ON_CPU, using

import fused_sft_loss as fsl

LOGITS = torch.randn(2, 5, 100)
LABELS = torch.randint(0, 100, (2, 5))
MASK = torch.ones(2, 5)


def changed(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


# (logits, labels, mask, options, error, words the message must hold)
TABLE = {
    "per-token losses [b, s]": (
        LOGITS[..., 0],
        LABELS,
        MASK,
        {},
        ValueError,
        ["called with labels", "[2, 5]", "without"],
    ),
    "per-token losses [s, b]": (
        LOGITS[..., 0].t(),
        LABELS,
        MASK,
        {},
        ValueError,
        ["called with labels"],
    ),
    "a scalar loss": (LOGITS.sum(), LABELS, MASK, {}, ValueError, ["called with labels"]),
    "not tensors": (
        LOGITS.tolist(),
        LABELS,
        MASK,
        {},
        TypeError,
        ["logits", "torch.Tensor", "list"],
    ),
    "labels missing": (LOGITS, None, MASK, {}, TypeError, ["labels", "NoneType"]),
    "float64 logits": (LOGITS.double(), LABELS, MASK, {}, TypeError, ["bfloat16", "float64"]),
    "integer logits": (LOGITS.int(), LABELS, MASK, {}, TypeError, ["int32"]),
    "fp8 logits": (LOGITS.to(torch.float8_e4m3fn), LABELS, MASK, {}, TypeError, ["float8_e4m3fn"]),
    "float labels": (LOGITS, LABELS.float(), MASK, {}, TypeError, ["integer", "float32"]),
    "bool labels": (LOGITS, LABELS.bool(), MASK, {}, TypeError, ["integer", "bool"]),
    "four dimensions": (
        LOGITS[None],
        LABELS,
        MASK,
        {},
        ValueError,
        ["[b, s, v]", "[1, 2, 5, 100]"],
    ),
    "labels of another shape": (LOGITS, LABELS[:, 1:], MASK, {}, ValueError, ["[2, 5]", "[2, 4]"]),
    "sbv without layout": (
        LOGITS.transpose(0, 1),
        LABELS,
        MASK,
        {},
        ValueError,
        ['layout="sbv"', "[5, 2]"],
    ),
    "mask of another shape": (LOGITS, LABELS, MASK[:, 1:], {}, ValueError, ["loss_mask", "[2, 4]"]),
    "no columns": (
        LOGITS[..., :0],
        LABELS,
        MASK,
        {},
        ValueError,
        ["at least one vocabulary column"],
    ),
    "strided columns": (
        LOGITS[..., ::2],
        LABELS % 50,
        MASK,
        {},
        ValueError,
        ["stride of 1", "contiguous"],
    ),
    "another device": (LOGITS, LABELS.to("meta"), MASK, {}, ValueError, ["labels", "cpu", "meta"]),
    "label too large": (
        LOGITS,
        changed(LABELS, (1, 3), 100),
        MASK,
        {},
        ValueError,
        ["[0, 100)", "got 100", "labels[1, 3]"],
    ),
    "label too small": (
        LOGITS,
        changed(LABELS, (0, 1), -7),
        None,
        {},
        ValueError,
        ["got -7", "labels[0, 1]"],
    ),
    "label in the padding": (
        LOGITS,
        changed(LABELS % 90, (0, 2), 95),
        MASK,
        {"vocab_size": 90},
        ValueError,
        ["[0, 90)", "got 95"],
    ),
    "negative weight": (
        LOGITS,
        LABELS,
        changed(MASK, (1, 2), -0.5),
        {},
        ValueError,
        ["-0.5", "loss_mask[1, 2]"],
    ),
    "NaN weight": (LOGITS, LABELS, changed(MASK, (0, 4), float("nan")), {}, ValueError, ["nan"]),
    "reduction": (LOGITS, LABELS, MASK, {"reduction": "avg"}, ValueError, ["mean", "avg"]),
    "layout": (LOGITS, LABELS, MASK, {"layout": "vbs"}, ValueError, ["bsv", "vbs"]),
    "smoothing of 1": (LOGITS, LABELS, MASK, {"label_smoothing": 1.0}, ValueError, ["< 1", "1.0"]),
    "negative z_loss": (LOGITS, LABELS, MASK, {"z_loss": -1.0}, ValueError, ["z_loss", "-1.0"]),
    "softcap of 0": (LOGITS, LABELS, MASK, {"softcap": 0.0}, ValueError, ["softcap", "None"]),
    "logit_scale of 0": (
        LOGITS,
        LABELS,
        MASK,
        {"logit_scale": 0.0},
        ValueError,
        ["logit_scale", "0.0"],
    ),
    "vocab_size of 0": (LOGITS, LABELS, MASK, {"vocab_size": 0}, ValueError, ["vocab_size", "0"]),
    "a shard without a group": (
        LOGITS,
        LABELS,
        MASK,
        {"vocab_size": 200},
        ValueError,
        ["tp_group", "200", "100"],
    ),
    "vocab_start without a group": (
        LOGITS,
        LABELS,
        MASK,
        {"vocab_start": 50},
        ValueError,
        ["tp_group"],
    ),
    "cu_seqlens of floats": (
        LOGITS,
        LABELS,
        MASK,
        {"cu_seqlens": torch.tensor([0.0, 10.0])},
        ValueError,
        ["int32", "float32"],
    ),
    "cu_seqlens out of range": (
        LOGITS,
        LABELS,
        MASK,
        {"cu_seqlens": torch.tensor([0, 11])},
        ValueError,
        ["[0, 10]", "[0, 11]"],
    ),
    "cu_seqlens out of order": (
        LOGITS,
        LABELS,
        MASK,
        {"cu_seqlens": torch.tensor([0, 7, 5])},
        ValueError,
        ["increasing"],
    ),
    "cu_seqlens without shift": (
        LOGITS,
        LABELS,
        MASK,
        {"cu_seqlens": torch.tensor([0, 10]), "shift": False},
        ValueError,
        ["shift_targets"],
    ),
    "unknown backend": (LOGITS, LABELS, MASK, {"backend": "tpu"}, ValueError, ["eager", "tpu"]),
    "in place on a leaf": (
        LOGITS.clone().requires_grad_(),
        LABELS,
        MASK,
        {"inplace_backward": True},
        ValueError,
        ["non-leaf", "inplace_backward=False"],
    ),
    "in place on shared rows": (
        (LOGITS[:1].clone().requires_grad_() * 1).expand(2, 5, 100),
        LABELS,
        MASK,
        {"inplace_backward": True},
        ValueError,
        ["share memory", "strides"],
    ),
}


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
    """What an accelerator does, where looking at a label would synchronise."""
    monkeypatch.setattr("fused_sft_loss.autograd.may_synchronise", lambda tensor: False)
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

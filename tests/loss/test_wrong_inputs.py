"""Promise: narrow types, sentinels and odd tensors give a right number or our own error."""

import math
import warnings

import pytest
import torch
from backends import BUILT

import fused_sft_loss as fsl
from fused_sft_loss import flags
from fused_sft_loss.megatron import ResponseOnlyHead, shift_packed_targets

LOGITS = torch.randn(2, 5, 50)
LABELS = torch.randint(0, 50, (2, 5))
MASK = torch.ones(2, 5)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)


def sparse():
    return {"logits": LOGITS.to_sparse()}


def nested():
    return {"logits": torch.nested.nested_tensor([LOGITS[0], LOGITS[1]], layout=torch.jagged)}


def quantized():
    with warnings.catch_warnings(action="ignore"):
        return {"logits": torch.quantize_per_tensor(LOGITS, 0.1, 0, torch.qint8)}


#: Changed arguments, the error, and words of its message.
REFUSED = {
    "soft labels": ({"labels": LOGITS.softmax(-1)}, TypeError, ["soft labels", "token ids"]),
    "complex labels": ({"labels": LABELS + 0j}, TypeError, ["integer", "complex64"]),
    "sparse logits": (sparse, TypeError, ["dense", "sparse", "to_dense()"]),
    "sparse mask": ({"loss_mask": MASK.to_sparse()}, TypeError, ["loss_mask", "to_dense()"]),
    "nested logits": (nested, TypeError, ["dense", "nested", "to_padded_tensor"]),
    "quantized logits": (quantized, TypeError, ["bfloat16", "qint8"]),
    "complex mask": ({"loss_mask": MASK + 0j}, TypeError, ["loss_mask", "complex64"]),
    "fp8 mask": ({"loss_mask": MASK.to(torch.float8_e4m3fn)}, TypeError, ["loss_mask", "float8"]),
    "uint16 mask": ({"loss_mask": MASK.to(torch.uint16)}, TypeError, ["loss_mask", "uint16"]),
    "uint32 mask": ({"loss_mask": MASK.to(torch.uint32)}, TypeError, ["loss_mask", "uint32"]),
    "uint64 mask": ({"loss_mask": MASK.to(torch.uint64)}, TypeError, ["loss_mask", "uint64"]),
    "infinite weight": ({"loss_mask": MASK * math.inf}, ValueError, ["finite", "loss_mask[0, 0]"]),
    "infinite weight in fp32": ({"loss_mask": MASK.double() * 1e39}, ValueError, ["finite"]),
    "mask elsewhere": ({"loss_mask": MASK.to("meta")}, ValueError, ["loss_mask", "meta", "move"]),
    "meta logits": ({"logits": LOGITS.to("meta")}, ValueError, ["labels", "device meta", "cpu"]),
    "boundaries in a batch": (
        {"cu_seqlens": torch.tensor([[0, 10]])},
        ValueError,
        ["[1, 2]", "pass cu_seqlens[0]"],
    ),
    "ignore_index None": ({"ignore_index": None}, TypeError, ["ignore_index", "int", "None"]),
    "ignore_index of 65 bits": ({"ignore_index": 2**64}, ValueError, ["ignore_index", "int64"]),
    "vocab_size float": ({"vocab_size": 5.0}, TypeError, ["vocab_size", "int", "float 5.0"]),
    "vocab_size bool": ({"vocab_size": True}, TypeError, ["vocab_size", "int", "bool True"]),
    "vocab_start float": ({"vocab_start": 0.0}, TypeError, ["vocab_start", "int"]),
    "shift of a word": ({"shift": "no"}, TypeError, ["shift", "bool", "str 'no'"]),
    "in place of a number": ({"inplace_backward": 2}, TypeError, ["inplace_backward", "bool"]),
    "softcap of a word": ({"softcap": "30"}, TypeError, ["softcap", "number", "str '30'"]),
    "logit_scale bool": ({"logit_scale": True}, TypeError, ["logit_scale", "number"]),
    "logit_scale None": ({"logit_scale": None}, TypeError, ["logit_scale", "number"]),
    "tp_group of a word": ({"tp_group": "tp"}, TypeError, ["tp_group", "process group", "str"]),
    "softcap lost in fp32": ({"softcap": 1e-46}, ValueError, ["softcap", "fp32", "1e-46"]),
    "softcap beyond fp32": ({"softcap": 1e39}, ValueError, ["softcap", "fp32"]),
    "scale lost in fp32": ({"logit_scale": 1e-40}, ValueError, ["logit_scale", "fp32"]),
    "scale beyond fp32": ({"logit_scale": 1e39}, ValueError, ["logit_scale", "fp32"]),
    "ratio beyond fp32": (
        {"logit_scale": 1e30, "softcap": 1e-30},
        ValueError,
        ["logit_scale / softcap", "fp32"],
    ),
    "z_loss lost in fp32": ({"z_loss": 1e-46}, ValueError, ["z_loss", "fp32"]),
    "smoothing lost in fp32": ({"label_smoothing": 1e-46}, ValueError, ["label_smoothing"]),
    "smoothing that is 1 in fp32": ({"label_smoothing": 1 - 1e-9}, ValueError, ["smoothing < 1"]),
}


@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("what", REFUSED)
def test_trap_refused_in_our_words(what, backend):
    change, error, words = REFUSED[what]
    given = {"logits": LOGITS, "labels": LABELS, "loss_mask": MASK, "backend": backend}
    given |= change() if callable(change) else change
    with pytest.raises(error) as caught:
        fsl.sft_loss(**given)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in {caught.value}"


@pytest.mark.parametrize("dtype", UNSIGNED + SIGNED, ids=str)
def test_trap_labels_of_narrow_types_score_what_their_values_say(backend, dtype):
    labels = LABELS.clone()
    labels[0, 2] = 0
    options = {"ignore_index": 0, "reduction": "none", "backend": backend}
    for more in ({}, {"cu_seqlens": torch.tensor([0, 3, 10])}, {"shift": False}):
        got = fsl.sft_loss(LOGITS, labels.to(dtype), MASK, **options, **more)
        assert torch.equal(got, fsl.sft_loss(LOGITS, labels, MASK, **options, **more))


@pytest.mark.parametrize("ignore_index", [-100, -1, -1000, 0, 300])
@pytest.mark.parametrize("dtype", UNSIGNED + SIGNED, ids=str)
def test_trap_shift_targets_widens_labels_that_cannot_hold_ignore_index(dtype, ignore_index):
    labels = LABELS.to(dtype)
    want, want_mask = fsl.shift_targets(LABELS, MASK, ignore_index=ignore_index)
    for shift in (fsl.shift_targets, shift_packed_targets):
        got, mask = shift(labels, MASK, ignore_index=ignore_index)
        assert torch.equal(got.long(), want) and torch.equal(mask, want_mask)
        limits = torch.iinfo(dtype)
        narrow = dtype not in UNSIGNED[1:] and limits.min <= ignore_index <= limits.max
        assert got.dtype == (dtype if narrow else torch.int64)
    rows = ResponseOnlyHead().select(got.to(dtype) if narrow else got, mask, ignore_index)
    assert (rows.labels != ignore_index).all() and len(rows.labels) == (want != ignore_index).sum()


def test_shift_targets_refuses_what_the_loss_refuses():
    for labels, mask, bounds, error in (
        (LABELS.float(), None, None, TypeError),
        (LABELS.tolist(), None, None, TypeError),
        (LOGITS.long(), None, None, ValueError),
        (LABELS, MASK + 0j, None, TypeError),
        (LABELS, MASK[:, 1:], None, ValueError),
        (LABELS, MASK, torch.tensor([[0, 10]]), ValueError),
        (LABELS, MASK.to("meta"), None, ValueError),
    ):
        with pytest.raises(error, match="expected"):
            fsl.shift_targets(labels, mask, bounds)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_trap_a_weight_counts_where_it_is_not_0_in_fp32(backend, dtype):
    """In fp32 1e-50 is 0 and 1e-30 is not. Every backend scores the same rows, with equal bits."""
    mask = torch.tensor([[1, 1e-50, 1e-30, 0, 2.5]] * 2, dtype=torch.float64).to(dtype)
    options = {"shift": False, "reduction": "none", "backend": backend}
    got = fsl.sft_loss(LOGITS, LABELS, mask, **options)
    whole = fsl.sft_loss(LOGITS, LABELS, **options)
    assert ((got != 0) == torch.tensor([True, False, True, False, True])).all()
    assert torch.equal(got, whole * mask.float())
    one = torch.zeros_like(mask)
    one[0, 1] = 1e-50
    leaf = LOGITS.clone().requires_grad_()
    mean = fsl.sft_loss(leaf, LABELS, one, shift=False, backend=backend)
    mean.backward()
    assert mean == 0 and (leaf.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (3, 1), (1,), (0,)], ids=str)
def test_trap_no_rows_one_row_and_nothing_to_predict(backend, shape):
    labels = torch.zeros(shape, dtype=torch.int64)
    for mask in (None, torch.ones(shape)):
        leaf = torch.randn(*shape, 50, requires_grad=True)
        loss = fsl.sft_loss(leaf, labels, mask, backend=backend)
        loss.backward()
        assert loss == 0 and leaf.grad.shape == leaf.shape and (leaf.grad == 0).all()
        metrics = fsl.token_metrics(leaf, labels, mask, backend=backend)
        assert all(figure.shape == shape and not figure.any() for figure in metrics)
    assert fsl.shift_targets(labels)[0].shape == shape
    if labels.numel():
        got = fsl.sft_loss(leaf, labels, shift=False, backend=backend)
        want = torch.nn.functional.cross_entropy(leaf.view(-1, 50), labels.view(-1))
        torch.testing.assert_close(got, want)


def test_meta_tensors_give_shapes():
    meta = [tensor.to("meta") for tensor in (LOGITS, LABELS, MASK)]
    assert fsl.sft_loss(*meta).shape == () and fsl.sft_loss(*meta).device.type == "meta"
    assert fsl.token_metrics(*meta).entropy.shape == LABELS.shape


@pytest.mark.parametrize("value", ["1", "true", "YES", "on", " On "])
def test_switches_that_are_on(monkeypatch, value):
    monkeypatch.setenv(flags.CHECK, value)
    assert flags.enabled(flags.CHECK)


@pytest.mark.parametrize("value", [None, "", "0", "false", "No", "OFF"])
def test_trap_switches_that_are_off(monkeypatch, value):
    monkeypatch.delenv(flags.CHECK, raising=False)
    if value is not None:
        monkeypatch.setenv(flags.CHECK, value)
    assert not flags.enabled(flags.CHECK)
    assert fsl.sft_loss(LOGITS, LABELS).isfinite()


@pytest.mark.parametrize("value", ["2", "maybe", "flase"])
def test_a_switch_that_says_nothing_is_an_error(monkeypatch, value):
    monkeypatch.setenv(flags.CHECK, value)
    with pytest.raises(ValueError, match=f"FUSED_SFT_LOSS_CHECK.*'{value}'"):
        fsl.sft_loss(LOGITS, LABELS)

"""Promise: wrong use is an error that says what was expected, what was passed, and the fix."""

import pytest
import torch

import fused_sft_loss as fsl

HIDDEN, WEIGHT = torch.randn(2, 5, 8), torch.randn(100, 8)
LABELS, MASK = torch.randint(0, 100, (2, 5)), torch.ones(2, 5)


def changed(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


# what is passed instead, the error, words that the message must contain
TABLE = {
    "hidden missing": ({"hidden": None}, TypeError, ["hidden", "NoneType"]),
    "nothing": ({"hidden": None, "weight": None}, TypeError, ["hidden", "NoneType"]),
    "weight missing": ({"weight": None}, TypeError, ["weight", "NoneType"]),
    "a layer": ({"weight": torch.nn.Linear(8, 100)}, TypeError, ["weight", "Linear"]),
    "labels missing": ({"labels": None}, TypeError, ["labels", "NoneType"]),
    "bias of numbers": ({"bias": [0.0] * 100}, TypeError, ["bias", "list"]),
    "float64": (
        {"hidden": HIDDEN.double(), "weight": WEIGHT.double()},
        TypeError,
        ["hidden in float32, bfloat16, float16", "float64"],
    ),
    "other dtype of weight": (
        {"weight": WEIGHT.bfloat16()},
        TypeError,
        ["weight in the dtype of hidden, torch.float32", "bfloat16", "autocast"],
    ),
    "other dtype of bias": ({"bias": torch.zeros(100).half()}, TypeError, ["bias", "float16"]),
    "other h": ({"weight": WEIGHT[:, :4]}, ValueError, ["one h", "[2, 5, 8]", "[100, 4]"]),
    "transposed weight": ({"weight": WEIGHT.t()}, ValueError, ["one h", "[8, 100]"]),
    "four dimensions": ({"hidden": HIDDEN[None]}, ValueError, ["[b, s, h]", "[1, 2, 5, 8]"]),
    "a vector": ({"weight": WEIGHT[0]}, ValueError, ["weight [v, h]", "[8]"]),
    "a number": ({"hidden": HIDDEN.sum()}, ValueError, ["[b, s, h]", "[]"]),
    "no columns": ({"weight": WEIGHT[:0]}, ValueError, ["without a 0", "[0, 8]"]),
    "no width": (
        {"hidden": HIDDEN[..., :0], "weight": WEIGHT[:, :0]},
        ValueError,
        ["without a 0", "[100, 0]"],
    ),
    "short bias": ({"bias": torch.zeros(99)}, ValueError, ["bias [100]", "[99]"]),
    "bias of two dimensions": ({"bias": torch.zeros(100, 1)}, ValueError, ["[100, 1]"]),
    "strided hidden": (
        {"hidden": torch.randn(2, 5, 16)[..., ::2]},
        ValueError,
        ["hidden with a last stride of 1", "hidden.contiguous()"],
    ),
    "strided weight": (
        {"weight": torch.randn(8, 100).t()},
        ValueError,
        ["weight with a last stride of 1", "weight.contiguous()"],
    ),
    "labels of another shape": ({"labels": LABELS[:, 1:]}, ValueError, ["[2, 5]", "[2, 4]"]),
    "sequence first": (
        {"hidden": HIDDEN.transpose(0, 1)},
        ValueError,
        ['layout="sbv"', "[5, 2]", "[2, 5]"],
    ),
    "batch first": ({"layout": "sbv"}, ValueError, ['drop layout="sbv"']),
    "float labels": ({"labels": LABELS.float()}, TypeError, ["integer", "float32"]),
    "label too large": (
        {"labels": changed(LABELS, (1, 3), 100)},
        ValueError,
        ["[0, 100)", "got 100", "labels[1, 3]"],
    ),
    "mask of another shape": ({"loss_mask": MASK[:, 1:]}, ValueError, ["loss_mask", "[2, 4]"]),
    "mask that wants a gradient": (
        {"loss_mask": MASK.clone().requires_grad_()},
        ValueError,
        ["loss_mask without requires_grad"],
    ),
    "another device": (
        {"labels": LABELS.to("meta"), "loss_mask": None},
        ValueError,
        ["labels", "meta"],
    ),
    "weight elsewhere": ({"weight": WEIGHT.to("meta")}, ValueError, ["weight", "cpu", "meta"]),
    "hidden elsewhere": ({"hidden": HIDDEN.to("meta")}, ValueError, ["weight", "cpu", "meta"]),
    "chunk_rows of 0": ({"chunk_rows": 0}, ValueError, ["chunk_rows", ">= 1", "got 0"]),
    "chunk_rows below 0": ({"chunk_rows": -1}, ValueError, ["chunk_rows", "-1"]),
    "half a row": ({"chunk_rows": 0.5}, ValueError, ["chunk_rows", "0.5"]),
    "chunk_rows of True": ({"chunk_rows": True}, ValueError, ["chunk_rows", "True"]),
    "rows of 0": ({"rows": 0}, ValueError, ["rows", "got 0"]),
    "multiple of 0": ({"multiple": 0}, ValueError, ["multiple", "got 0"]),
    "rows and multiple": ({"rows": 8, "multiple": 8}, ValueError, ["multiple or rows", "both"]),
    "too few rows": ({"rows": 3}, ValueError, ["rows=3", "got 8"]),
    "in place": ({"inplace_backward": True}, ValueError, ["no inplace_backward"]),
    "parts without a group": ({"sequence_parallel": True}, ValueError, ["tp_group", "None"]),
    "parts of no kind": ({"sequence_parallel": "no"}, TypeError, ["sequence_parallel", "a bool"]),
    "reduction": ({"reduction": "avg"}, ValueError, ["mean", "avg"]),
    "unknown option": ({"smoothing": 0.1}, TypeError, ["smoothing"]),
    "smoothing of 1": ({"label_smoothing": 1.0}, ValueError, ["< 1", "1.0"]),
    "a shard without a group": ({"vocab_size": 200}, ValueError, ["tp_group", "200", "100"]),
    "unknown backend": ({"backend": "tpu"}, ValueError, ["eager", "tpu"]),
    "backend elsewhere": ({"backend": "cuda"}, NotImplementedError, ["cuda", "cannot run on cpu"]),
    "a declared gradient of NaN": (
        {"grad_in_forward": float("nan")},
        ValueError,
        ["grad_in_forward", "finite"],
    ),
    "a sparse weight": ({"weight": WEIGHT.to_sparse()}, TypeError, ["weight", "dense"]),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("what", TABLE)
def test_message_says_expected_got_and_fix(what, autocast):
    changes, error, words = TABLE[what]
    if autocast and ("dtype" in what or what == "strided hidden"):
        pytest.skip("autocast converts it, to one dtype and contiguous")
    given = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "loss_mask": MASK, **changes}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(error) as caught:
        fsl.linear_sft_loss(**given)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in {caught.value}"


@pytest.mark.parametrize("one_pass", [False, True])
def test_without_the_value_check_a_wrong_label_poisons_its_row_alone(one_pass, monkeypatch):
    """As on an accelerator, where reading a label on the host would synchronise."""
    monkeypatch.setattr("fused_sft_loss.scoring.may_synchronise", lambda tensor: False)
    hidden = HIDDEN.clone().requires_grad_()
    labels = changed(LABELS, (1, 3), 100)
    losses = fsl.linear_sft_loss(
        hidden, WEIGHT, labels, MASK, reduction="none", grad_in_forward=one_pass
    )
    losses.sum().backward()
    assert losses.isnan().nonzero().tolist() == [[1, 2]]
    assert hidden.grad[1, 2].isnan().all() and hidden.grad.isnan().sum() == 8


def test_wrong_labels_under_the_mask_do_not_matter():
    labels = changed(changed(LABELS, (1, 3), 10**6), (0, 2), -5)
    mask = changed(changed(MASK, (1, 3), 0), (0, 2), 0)
    assert fsl.linear_sft_loss(HIDDEN, WEIGHT, labels, mask).isfinite()

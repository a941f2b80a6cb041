"""Promise: in Hugging Face's Trainer loss and gradients are those of the model's own loss."""

import copy
import subprocess
import sys
from functools import partial

import hugging_face
import pytest
import torch
from hugging_face import needs_transformers
from oracle import evaluate

import fused_sft_loss as fsl
from fused_sft_loss import one_read
from fused_sft_loss.hf import compute_loss_func

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def stacked(data):
    return (torch.stack([one[key] for one in data]) for key in ("input_ids", "labels"))


def assert_same_training(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=0)
    assert len(got[1]) == len(want[1]) == hugging_face.STEPS
    for ours, theirs in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert got[2] == pytest.approx(want[2], rel=1e-5)


@needs_transformers
@pytest.mark.parametrize(
    "options",
    [{}, {"inplace_backward": True}, {"grad_in_forward": True, "backend": "cpu"}],
    ids=str,
)
def test_training_equals_that_with_the_models_own_loss(options):
    """Micro-batches score unlike numbers of tokens, so a mean of means would differ."""
    model, data = hugging_face.causal(), hugging_face.examples()
    want = hugging_face.train(copy.deepcopy(model), data)
    got = hugging_face.train(model, data, partial(compute_loss_func, **options))
    assert_same_training(got, want)


@needs_transformers
def test_the_loss_that_a_router_adds_is_kept():
    model, data = hugging_face.experts(), hugging_face.examples()
    want = hugging_face.train(copy.deepcopy(model), data)
    with pytest.raises(ValueError, match="expected aux_loss_coef, got None"):
        hugging_face.train(copy.deepcopy(model), data, compute_loss_func)
    coefficient = model.config.router_aux_loss_coef
    loss = partial(compute_loss_func, aux_loss_coef=coefficient)
    assert_same_training(hugging_face.train(model, data, loss), want)


@needs_transformers
@pytest.mark.parametrize("kind", ["encoder_decoder", "masked"])
def test_a_model_whose_labels_are_not_shifted_is_refused_until_the_shift_is_off(kind):
    """A shift would train it, silently, on the next label."""
    model = getattr(hugging_face, kind)()
    tokens, labels = stacked(hugging_face.examples())
    inputs = {"input_ids": tokens}
    if kind == "encoder_decoder":
        inputs["decoder_input_ids"] = tokens
    outputs = model(**inputs)
    with pytest.raises(ValueError, match="LMOutput, where row t predicts label t.*shift=False"):
        compute_loss_func(outputs, labels)
    got = compute_loss_func(outputs, labels, shift=False)
    torch.testing.assert_close(got, model(**inputs, labels=labels).loss, rtol=1e-5, atol=0)


@needs_transformers
@pytest.mark.parametrize(
    "options",
    [{"label_smoothing": 0.1}, {"softcap": 3.0, "z_loss": 1e-3, "inplace_backward": True}],
    ids=str,
)
def test_options_against_the_oracle(options):
    """The first optimizer step: the sum over its micro-batches / the tokens scored in all."""
    model, data = hugging_face.causal(), hugging_face.examples()
    exact = copy.deepcopy(model).double()
    losses, (gradients, *_), _ = hugging_face.train(
        model, data, partial(compute_loss_func, **options)
    )
    first = data[: hugging_face.BATCH * hugging_face.ACCUMULATED]
    tokens, labels = stacked(first)
    options.pop("inplace_backward", None)
    logits = exact(input_ids=tokens).logits
    want = evaluate(logits, labels, **options)
    items = (labels[:, 1:] != -100).sum()
    logits.backward(want.grad.view_as(logits) / items)
    step = losses[: hugging_face.ACCUMULATED].sum().double()
    torch.testing.assert_close(step, want.losses.sum() / items, rtol=1e-5, atol=0)
    for name, parameter in exact.named_parameters():
        torch.testing.assert_close(gradients[name].double(), parameter.grad, **CLOSE)


@needs_transformers
@pytest.mark.parametrize("arguments", [{"bf16": True}, {}], ids=str)
def test_mixed_precision_hands_over_a_copy_in_fp32(arguments):
    """docs/trainers.md says so: the Trainer's bf16=True costs memory that a bf16 model does not."""
    model, dtypes = hugging_face.causal(), []
    if not arguments:
        model = model.bfloat16()

    def loss(outputs, labels, num_items_in_batch=None):
        dtypes.append(outputs.logits.dtype)
        return compute_loss_func(outputs, labels, num_items_in_batch)

    losses, *_ = hugging_face.train(model, hugging_face.examples(), loss, **arguments)
    assert set(dtypes) == {torch.float32 if arguments else torch.bfloat16}
    assert losses.isfinite().all()


@needs_transformers
def test_the_trainers_own_label_smoothing_is_not_applied():
    """docs/trainers.md says so: the Trainer passes label_smoothing_factor to nobody else."""
    model, data = hugging_face.causal(), hugging_face.examples()
    plain = hugging_face.train(copy.deepcopy(model), data, compute_loss_func)
    smoothed = hugging_face.train(model, data, compute_loss_func, label_smoothing_factor=0.1)
    assert torch.equal(plain[0], smoothed[0])


@needs_transformers
def test_a_step_without_a_scored_token_changes_nothing():
    """The model's own loss divides 0 by 0: it trains with NaN from then on."""
    model, data = hugging_face.causal(), hugging_face.examples(scored=[0])
    losses, steps, _ = hugging_face.train(model, data, compute_loss_func)
    assert (losses == 0).all()
    assert all((gradient == 0).all() for step in steps for gradient in step.values())


@needs_transformers
def test_documents_that_the_collator_packs_do_not_predict_each_other():
    from transformers import DataCollatorWithFlattening

    data = [{key: ids.tolist() for key, ids in one.items()} for one in hugging_face.examples()]
    packed = DataCollatorWithFlattening(return_tensors="pt")(data)
    labels = packed["labels"]
    logits = torch.randn(*labels.shape, hugging_face.VOCAB)
    bounds = torch.arange(0, labels.numel() + 1, hugging_face.SEQ)
    want = evaluate(logits, labels, cu_seqlens=bounds).reduce("mean")
    torch.testing.assert_close(compute_loss_func(logits, labels).double(), want, **CLOSE)


# --- the function alone ---------------------------------------------------------------------------


def batch():
    labels = torch.randint(0, 11, (2, 5))
    labels[0, :3] = -100
    return torch.randn(2, 5, 11, requires_grad=True), labels


@pytest.mark.parametrize(
    "wrap",
    [lambda x: {"loss": None, "logits": x}, lambda x: (x, "cache"), lambda x: x],
    ids=["mapping", "tuple", "logits"],
)
@pytest.mark.parametrize("items", [7, torch.tensor(7), torch.tensor(7.0), None], ids=repr)
def test_every_form_of_outputs_and_number_of_items(wrap, items):
    logits, labels = batch()
    loss = compute_loss_func(wrap(logits), labels, num_items_in_batch=items)
    want = evaluate(logits, labels)
    scored = 6 if items is None else 7
    torch.testing.assert_close(loss.double(), want.losses.sum() / scored, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad.double().view_as(want.grad), want.grad / scored, **CLOSE)


@pytest.mark.parametrize("items", [0, torch.tensor(0), None], ids=repr)
def test_no_scored_token_gives_zero_with_a_graph(items):
    logits, labels = batch()
    loss = compute_loss_func({"logits": logits}, torch.full_like(labels, -100), items)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("items", [3, torch.tensor(3), torch.tensor(3.0)], ids=repr)
@pytest.mark.parametrize("expected", [True, 0.37, torch.tensor(0.37)], ids=repr)
def test_grad_in_forward_expects_the_gradient_of_the_quotient(items, expected, monkeypatch):
    """Backward then gets the expected gradient and corrects no row, although the loss is divided.

    The third is no power of two: another order of the division would differ in the last bit.
    """
    logits, labels = batch()
    declared = []
    original = one_read.expected_gradient

    def watched(*given):
        declared.append(original(*given))
        return declared[-1]

    monkeypatch.setattr(one_read, "expected_gradient", watched)
    upstream = torch.tensor(1.0 if expected is True else 0.37)
    total = fsl.sft_loss(logits, labels, reduction="sum")
    (real,) = torch.autograd.grad(total / items, total, upstream)
    loss = compute_loss_func(logits, labels, items, grad_in_forward=expected, backend="cpu")
    assert torch.equal(declared[0], real)
    loss.backward(upstream)
    want = evaluate(logits, labels).grad / 3 * float(upstream)
    torch.testing.assert_close(logits.grad.double().view_as(want), want, **CLOSE)


@pytest.mark.parametrize("wrong", ["a string", float("nan"), float("inf"), torch.ones(2)], ids=repr)
def test_a_wrong_grad_in_forward_is_refused_as_by_the_loss(wrong):
    with pytest.raises((TypeError, ValueError), match="grad_in_forward False, True"):
        compute_loss_func(*batch(), 3, grad_in_forward=wrong)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"labels": None}, "expected labels, got None"),
        ({"outputs": {"loss": 1}}, "expected outputs with 'logits'.*got .'loss'."),
        ({"outputs": ()}, "expected outputs with 'logits'.*got tuple"),
        ({"num_items_in_batch": torch.ones(2, 1)}, "got shape .2, 1.*torchrun"),
        ({"reduction": "mean"}, "expected no reduction"),
        ({"layout": "sbv"}, "expected no layout"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "expected no cu_seqlens"),
    ],
    ids=str,
)
def test_wrong_calls_say_what_to_change(change, words):
    logits, labels = batch()
    given = {"outputs": {"logits": logits}, "labels": labels, "num_items_in_batch": 6}
    with pytest.raises((TypeError, ValueError), match=words):
        compute_loss_func(**{**given, **change})


def test_the_package_does_not_import_transformers(tmp_path):
    (tmp_path / "transformers.py").write_text("raise AssertionError('imported')\n")
    program = "import fused_sft_loss.hf, sys; assert 'transformers' not in sys.modules"
    path = {"PYTHONPATH": f"{tmp_path}:."}
    subprocess.run([sys.executable, "-c", program], check=True, env=path)

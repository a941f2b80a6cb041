"""The lines of docs/trainers.md give each trainer the losses and gradients of its own formula.

They run as printed, against stand-ins with the trainer's names and signatures. Each check also runs
with a mistake in the lines, which it must notice.
"""

import copy
import dataclasses
import tempfile

import hugging_face
import labelled_runs
import logprob_runs
import pytest
import snippets
import torch
from stand_ins import faked

from bench.ranks import RankError, run_ranks
from fused_sft_loss import hf

PAGE = "docs/trainers.md"
LINES = {snippet.name: snippet for snippet in snippets.of(PAGE)}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def close(got, want):
    torch.testing.assert_close(got.double(), want, **CLOSE)


# --- trainers that call the model with labels -----------------------------------------------------


@pytest.fixture(scope="module")
def labelled():
    return run_ranks(1, labelled_runs.in_float64)[0]


def check_labelled(snippet, labelled, tp=2):
    """Loss and gradients are those of the definition, and masked rows are not computed."""
    total, count, whole = labelled
    for rank, run in enumerate(run_ranks(tp, labelled_runs.trained, snippet, tp)):
        loss, tokens, grads, nonzero = run
        assert loss == pytest.approx(total, rel=1e-5)
        assert tokens == nonzero == count
        for name, (grad, dim) in grads.items():
            want = whole[name] if dim is None else whole[name].chunk(tp, dim)[rank]
            close(grad, want)


@pytest.mark.parametrize("name", labelled_runs.STEPS)
def test_trainers_that_call_the_model_with_labels(name, labelled):
    check_labelled(LINES[name], labelled)


def test_ms_swift_keeps_its_step_for_other_tasks():
    (logits,) = run_ranks(1, labelled_runs.logits_of_another_task, LINES["ms swift"])
    assert logits.dim() == 3


# --- trainers that compute log-probabilities ------------------------------------------------------


def check_slime_loss(snippet, tp=2, cp=1, per_token=False):
    total, of_ranks = logprob_runs.slime_loss_in_float64(tp, cp, per_token)
    runs = run_ranks(tp * cp, logprob_runs.slime_loss, snippet, tp, cp, per_token)
    for (loss, logged, grad), want in zip(runs, of_ranks, strict=True):
        assert loss == logged
        close(grad, want)
    assert sum(loss for loss, *_ in runs) / tp == pytest.approx(total, rel=1e-5)


def check_slime_logprobs(snippet, with_entropy=True, with_entropy_grad=True):
    whole, labels, temperature, grad, grad_entropy = logprob_runs.rows(9)
    has_grad = with_entropy and with_entropy_grad
    given = torch.ones_like(temperature), grad, grad_entropy * has_grad
    log_probs, entropies, gradient = logprob_runs.in_float64(whole, labels, *given)
    runs = run_ranks(2, logprob_runs.slime_logprobs, snippet, with_entropy, with_entropy_grad)
    for rank, (got, entropy, got_gradient, entropy_grads) in enumerate(runs):
        close(got, log_probs[:, None])
        close(got_gradient, gradient.chunk(2, -1)[rank])
        assert (entropy is not None) == with_entropy
        assert entropy_grads == has_grad
        if with_entropy:
            close(entropy, entropies)


def check_nemo_rl(snippet, chunk_size=None, inference_only=False):
    whole, tokens, temperature, grad, _ = logprob_runs.rows(2, 6)
    grad[:, -1] = 0  # the last position is dropped
    given = torch.ones_like(temperature), grad, torch.zeros_like(grad)
    log_probs, _, gradient = logprob_runs.in_float64(whole, tokens.roll(-1, -1), *given)
    runs = run_ranks(2, logprob_runs.nemo_rl, snippet, chunk_size, inference_only)
    for rank, (got, got_gradient) in enumerate(runs):
        close(got, log_probs[:, :-1])
        assert not got.requires_grad
        if not inference_only:
            close(got_gradient, gradient.chunk(2, -1)[rank])


def check_verl_megatron(snippet, calculate_entropy=False, padding=0):
    whole, labels, temperature, grad, grad_entropy = logprob_runs.padded_rows(padding)
    given = temperature, grad, grad_entropy * calculate_entropy
    log_probs, entropies, gradient = logprob_runs.in_float64(whole, labels, *given)
    runs = run_ranks(2, logprob_runs.verl_megatron, snippet, calculate_entropy, padding)
    for rank, (found, got_gradient) in enumerate(runs):
        close(found.pop("log_probs"), log_probs)
        close(got_gradient, gradient.chunk(2, -1)[rank])
        assert set(found) == ({"entropy"} if calculate_entropy else set())
        if calculate_entropy:
            close(found["entropy"], entropies)


def check_verl_fsdp(snippet, inplace_backward=True):
    whole, labels, temperature, grad, _ = logprob_runs.rows(9)
    given = torch.ones_like(temperature), grad, torch.zeros_like(grad)
    log_probs, _, gradient = logprob_runs.in_float64(whole, labels, *given)
    ((got, got_gradient),) = run_ranks(1, logprob_runs.verl_fsdp, snippet, inplace_backward)
    close(got, log_probs)
    close(got_gradient, gradient)


CHECKS = {
    "slime loss": check_slime_loss,
    "slime logprobs": check_slime_logprobs,
    "nemo rl": check_nemo_rl,
    "verl logprobs": check_verl_megatron,
    "verl entropy": check_verl_megatron,
    "verl fsdp": check_verl_fsdp,
}
CASES = [  # (name of the lines, arguments of their check)
    ("slime loss", {"tp": 2}),
    ("slime loss", {"tp": 1, "cp": 2}),
    ("slime loss", {"tp": 1, "per_token": True}),
    ("slime logprobs", {}),
    ("slime logprobs", {"with_entropy_grad": False}),
    ("slime logprobs", {"with_entropy": False}),
    ("nemo rl", {}),
    ("nemo rl", {"chunk_size": 4}),
    ("nemo rl", {"inference_only": True}),
    ("nemo rl", {"chunk_size": 4, "inference_only": True}),
    ("verl logprobs", {}),
    ("verl entropy", {"padding": 2}),
    ("verl entropy", {"padding": 2, "calculate_entropy": True}),
    ("verl fsdp", {}),
    ("verl fsdp", {"inplace_backward": False}),
]


@pytest.mark.parametrize("name, given", CASES, ids=str)
def test_trainers_that_compute_logprobs(name, given):
    CHECKS[name](LINES[name], **given)


# --- trainers on Hugging Face's -------------------------------------------------------------------


def trl():
    """TRL's SFTTrainer on the real Trainer. It runs the model once more for its metrics."""
    from transformers import Trainer

    class SFTTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **more):
            with torch.no_grad():
                model(**inputs)
            return super().compute_loss(model, inputs, return_outputs, **more)

    return {"trl": {"SFTConfig": hugging_face.training_arguments, "SFTTrainer": SFTTrainer}}


def run_trl(snippet, model, data, folder):
    with faked(trl()):
        snippet.run({"model": model, "dataset": data, "output_dir": folder})


def run_axolotl(snippet, model, data, folder):
    """Axolotl creates the trainer, calls its plugins, and trains."""
    from transformers import Trainer

    with faked({"axolotl.integrations.base": {"BasePlugin": object}}):
        plugin = snippet.run({})["FusedSFTLoss"]()
    arguments = hugging_face.training_arguments(folder)
    trainer = Trainer(model, arguments, train_dataset=data)
    plugin.post_trainer_create(None, trainer)
    trainer.train()


HUGGING_FACE = {"trl": run_trl, "axolotl": run_axolotl}


def check_hugging_face(snippet, monkeypatch):
    """The weights after training are those of the Trainer alone, the loss is this package's, and
    the model runs once for each batch."""
    from transformers import Trainer

    used, ran, original = [], [], hf.sft_loss

    def watched(*args, **options):
        used.append(options)
        return original(*args, **options)

    monkeypatch.setattr(hf, "sft_loss", watched)
    model, data = hugging_face.causal(), hugging_face.examples()
    plain = copy.deepcopy(model)
    model.register_forward_hook(lambda *_: ran.append(True))
    with tempfile.TemporaryDirectory() as folder:
        HUGGING_FACE[snippet.name](snippet, model, data, folder)
        assert len(used) == len(ran) == hugging_face.STEPS * hugging_face.ACCUMULATED
        Trainer(plain, hugging_face.training_arguments(folder), train_dataset=data).train()
    for key, weight in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], weight, **CLOSE)


@hugging_face.needs_transformers
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_trainers_on_hugging_faces(name, monkeypatch):
    check_hugging_face(LINES[name], monkeypatch)


# --- the checks -----------------------------------------------------------------------------------


def test_every_block_of_the_page_is_run():
    here = {*labelled_runs.STEPS, *CHECKS, *HUGGING_FACE}
    assert set(LINES) == here | {"hugging face", "dtensor"}  # those: test_docs_snippets.py


def mistaken(name, right, wrong):
    snippet = LINES[name]
    assert right in snippet.code
    return dataclasses.replace(snippet, code=snippet.code.replace(right, wrong))


MISTAKES = [  # (the right words, wrong ones, arguments of the check)
    ("slime loss", "shift=False,", "", {}),
    ("slime loss", "tokens.roll(-1)", "tokens", {}),
    ("slime loss", "temperature=args.rollout_temperature,", "", {}),
    ("slime loss", "tp_group=mpu.get_tensor_model_parallel_group(),", "", {}),
    ("slime loss", "slice_with_cp(part, 0) for", "part for", {"tp": 1, "cp": 2}),
    ("slime loss", "- 1, 1))", ", 0))", {}),
    ("slime logprobs", "shift=False, ", "", {"with_entropy": False}),
    ("slime logprobs", "entropy.detach()", "entropy", {"with_entropy_grad": False}),
    ("slime logprobs", "if log_prob_keep_mask is not None", "if False", {}),
    ("nemo rl", "shift=False, ", "", {}),
    ("nemo rl", "logits.detach() if inference_only else ", "", {"inference_only": True}),
    ("nemo rl", ", tp_group=group", "", {}),
    ("verl logprobs", "shift=False, ", "", {}),
    ("verl logprobs", ", tp_group=group", "", {}),
    ("verl entropy", "shift=False,", "", {}),
    ("verl entropy", "temperature=temperature,", "", {"padding": 2}),
    ("verl entropy", "temperature > 0,", "", {"padding": 2}),
    ("verl entropy", '"distillation_only"', "", {"calculate_entropy": True}),
    ("verl fsdp", "shift=False, ", "", {}),
    ("verl fsdp", "=inplace_backward)", "=True)", {"inplace_backward": False}),
]


@pytest.mark.long
@pytest.mark.parametrize("name, right, wrong, given", MISTAKES, ids=str)
def test_a_mistake_in_the_lines_is_noticed(name, right, wrong, given):
    with pytest.raises((AssertionError, RankError)):
        CHECKS[name](mistaken(name, right, wrong), **given)


@pytest.mark.parametrize("name", labelled_runs.STEPS)
def test_a_step_that_is_not_replaced_is_noticed(name, labelled):
    snippet = mistaken(name, "with fused_cross_entropy(model, inplace_backward=True):", "if True:")
    with pytest.raises(AssertionError):
        check_labelled(snippet, labelled)


@hugging_face.needs_transformers
@pytest.mark.long
@pytest.mark.parametrize(
    "name, right, wrong",
    [
        ("trl", "compute_loss = Trainer.compute_loss", "pass"),
        ("trl", "trainer.compute_loss_func", "trainer.loss_func"),
        ("axolotl", "trainer.compute_loss_func", "trainer.loss_func"),
    ],
)
def test_a_mistake_under_hugging_face_is_noticed(name, right, wrong, monkeypatch):
    with pytest.raises(AssertionError):
        check_hugging_face(mistaken(name, right, wrong), monkeypatch)

"""Every Python snippet of the README and docs/ runs as printed and does what the page says."""

import copy
import runpy
import sys
import tempfile
from functools import partial

import hugging_face
import pytest
import snippets
import torch
import torch.nn.functional as F
from stand_ins import fake_modules
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fused_sft_loss as fsl
from bench.megatron_cpu import run_ranks
from examples.small_run import make_batches, run_schedule

SNIPPETS = snippets.everything()
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def batch(dtype=torch.float32):
    """(non-leaf logits, their leaf, labels, loss_mask)."""
    leaf = torch.randn(2, 9, 64, requires_grad=True)
    mask = torch.tensor([1, 0.5, 1, 0, 2, 1, 1, 0, 1]).expand(2, 9)  # the first is never a target
    return (leaf * 3).to(dtype), leaf, torch.randint(0, 64, (2, 9)), mask


def by_hand(logits, labels, mask):
    """The loss by its definition in float64, and its gradient for the logits."""
    logits = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    loss = (losses * mask[:, 1:]).sum() / mask[:, 1:].sum()
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def test_every_snippet_has_a_check():
    """tests/trainers/test_trainers_lines.py checks the others of docs/trainers.md."""
    elsewhere = {key for key in SNIPPETS if key[0] == "docs/trainers.md"} - set(PLAIN)
    assert set(SNIPPETS) == {*PLAIN, *MEGATRON, *elsewhere}


def check_readme(page, name):
    logits, leaf, labels, mask = batch()
    names = {"logits": logits, "labels": labels, "loss_mask": mask, "F": F}
    loss = SNIPPETS[page, name].run(names)["loss"]
    if name == "equal":
        loss.backward()
    want, grad = by_hand(logits, labels, mask)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(leaf.grad.double(), grad * 3, **CLOSE)


def check_first_call(page, name):
    names = SNIPPETS[page, name].run({})
    want, grad = by_hand(names["logits"], names["labels"], names["loss_mask"])
    torch.testing.assert_close(names["loss"].double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(names["logits"].grad.double(), grad, rtol=2e-2, atol=1e-4)


def check_other_calls(page, name):
    names = SNIPPETS[page, "first call"].run({})
    first = names["loss"].detach()
    names = SNIPPETS[page, name].run(names)
    torch.testing.assert_close(names["loss"].detach(), first, rtol=0, atol=0)  # shift_targets
    labels, mask = names["labels"][:, 1:], names["loss_mask"][:, 1:]
    right = (names["logits"][:, :-1].argmax(-1) == labels) & (mask != 0)
    assert float(names["accuracy"]) == pytest.approx(float(right.sum() / mask.sum()))


def check_without_logits(page, name):
    """The loss and the three gradients of a layer and sft_loss."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 16, requires_grad=True)
    layer = torch.nn.Linear(16, 64)
    _, _, labels, mask = batch()
    given = {"hidden": hidden, "labels": labels, "loss_mask": mask, "lm_head": layer, "fsl": fsl}
    loss = SNIPPETS[page, name].run(given)["loss"]
    want = fsl.sft_loss(layer(hidden), labels, mask)
    torch.testing.assert_close(loss, want)
    inputs = hidden, layer.weight, layer.bias
    got = hidden.grad, layer.weight.grad, layer.bias.grad
    for grad, wanted in zip(got, torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(grad, wanted, **CLOSE)


def check_algorithm(page, name):
    """The PyTorch code of the design gives the package's loss and gradient, for one and two shards
    and two dtypes."""
    names = SNIPPETS[page, name].run({})
    for dtype, close in ((torch.float32, CLOSE), (torch.bfloat16, {"rtol": 1e-2, "atol": 1e-6})):
        logits, _, labels, mask = batch(dtype)
        logits = logits.detach().requires_grad_()
        want = fsl.sft_loss(logits, labels, mask)
        want.backward()
        for shards in (1, 2):
            parts = [part.detach() for part in logits.chunk(shards, -1)]
            loss, grads = names["loss_and_gradient"](parts, labels, mask)
            torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=0)
            torch.testing.assert_close(torch.cat(grads, -1), logits.grad, **close)


def check_hugging_face(page, name):
    """The weights after training are those of the Trainer without the function."""
    if hugging_face.ABSENT:
        pytest.skip(hugging_face.ABSENT)
    from transformers import Trainer

    model, data = hugging_face.causal(), hugging_face.examples()
    folder = tempfile.TemporaryDirectory()
    args = hugging_face.training_arguments(folder.name)
    plain = copy.deepcopy(model)
    SNIPPETS[page, name].run({"model": model, "args": args, "dataset": data})
    before = copy.deepcopy(plain.state_dict())
    Trainer(plain, args, train_dataset=data).train()
    for key, weight in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], weight, **CLOSE)
        assert not torch.equal(weight, before[key])


def sharded_step(snippet):
    """(loss, gradient, loss written by hand, its gradient) on two ranks, of a snippet."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)  # the same labels on both ranks
    logits, _, labels, mask = batch()
    leaf = distribute_tensor(logits.detach()[..., :63], mesh, [Shard(2)]).requires_grad_()
    labels = labels.clamp(max=62)
    loss = snippet.run({"fsl": fsl, "logits": leaf * 1, "labels": labels})["loss"]
    plain = logits.detach()[..., :63].double().requires_grad_()
    want = F.cross_entropy(plain.mT, labels)
    want.backward()
    return loss.detach().double(), leaf.grad.full_tensor().double(), want.detach(), plain.grad


def check_dtensor(page, name):
    for loss, grad, want, right in run_ranks(2, sharded_step, SNIPPETS[page, name]):
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
        torch.testing.assert_close(grad, right, **CLOSE)


PLAIN = {
    ("README.md", "use"): check_readme,
    ("README.md", "equal"): check_readme,
    ("docs/index.md", "first call"): check_first_call,
    ("docs/index.md", "other calls"): check_other_calls,
    ("docs/index.md", "without logits"): check_without_logits,
    ("docs/design.md", "algorithm"): check_algorithm,
    ("docs/trainers.md", "hugging face"): check_hugging_face,
    ("docs/trainers.md", "dtensor"): check_dtensor,
}


@pytest.mark.parametrize("page, name", PLAIN)
def test_snippet(page, name):
    PLAIN[page, name](page, name)


# --- Megatron -------------------------------------------------------------------------------------


def shifted(data_iterator):
    """A batch as Megatron's datasets hold it: labels and mask are shifted already."""
    batch = next(data_iterator)
    labels, mask = batch["tokens"].roll(-1, 1), batch["loss_mask"].roll(-1, 1)
    mask[:, -1] = 0
    return {**batch, "labels": labels, "loss_mask": mask}


def loss_func_of(mask):
    def loss_func(output_tensor):
        loss, count = (output_tensor * mask).sum(), mask.sum().to(torch.int)
        report = torch.stack([loss.detach().clone(), count.float()])
        return loss, count, {"lm loss": report}

    return loss_func


def trainers_step(data_iterator, model, return_schedule_plan=False):
    """A forward step like Megatron-LM's and Primus': it calls the model with labels."""
    batch = shifted(data_iterator)
    inputs = batch["tokens"], batch["position_ids"], batch["attention_mask"]
    mask = batch["loss_mask"]
    return model(*inputs, labels=batch["labels"], loss_mask=mask), loss_func_of(mask)


# pretrain_gpt.py's get_batch returns the values of these keys.
TUPLE = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
TUPLE_OF_TEN = ("attention_mask", "cu_seqlens", "cu_seqlens_padded", "hybrid_cp_group", "labels")
TUPLE_OF_TEN += ("local_cp_size", "loss_mask", "max_seqlen", "position_ids", "tokens")
GET_BATCH = {
    "tuple": lambda iterator: map(shifted(iterator).get, TUPLE),
    "tuple of ten": lambda iterator: map(shifted(iterator).get, TUPLE_OF_TEN),
}


def bridge():
    """Fakes of the Megatron-Bridge modules that the snippet imports. Its step loads the batch by a
    function of its module and keeps the mask from the model."""
    called, package = [], "megatron.bridge.training"

    def get_batch(data_iterator):
        batch = shifted(data_iterator)
        return *(batch[key] for key in TUPLE), None

    def forward_step(state, data_iterator, model, return_schedule_plan=False):
        gpt_step = sys.modules[f"{package}.gpt_step"]
        tokens, labels, mask, attention_mask, positions, _ = gpt_step.get_batch(data_iterator)
        return model(tokens, positions, attention_mask, labels=labels), loss_func_of(mask)

    finetune = {"finetune": lambda config, step: called.append(step)}
    fake_modules(
        {
            f"{package}.finetune": finetune,
            f"{package}.gpt_step": {"get_batch": get_batch, "forward_step": forward_step},
            f"{package}.state": {"GlobalState": type("GlobalState", (), {})},
        }
    )
    return called


class PrimusPatches:
    """examples/primus_patches.py in a fake of Primus, which applies it and then trains."""

    def run(self, names):
        patches = []

        def register_patch(name, *, backend, phase, description):
            assert (backend, phase) == ("megatron", "before_train")
            return lambda patch: patches.append(patch) or patch

        package = "primus.backends.megatron.sft.forward_step"
        fake_modules(
            {
                "primus.core.patches": {"register_patch": register_patch},
                package: {"create_sft_forward_step": lambda: trainers_step},
            }
        )
        runpy.run_path(str(snippets.ROOT / "examples/primus_patches.py"))
        for patch in patches:
            patch(None)
        return {"forward_step": sys.modules[package].create_sft_forward_step()}


def in_megatron(snippet, step, cp):
    """Train with a snippet's forward step: (loss, tokens, gradients, reports, losses that are
    not 0, or None where the model returns logits).

    It is called as Megatron's schedules call it, with return_schedule_plan (of 0.14 on).
    """
    get_batch = GET_BATCH.get(getattr(snippet, "name", None), next)
    names = {"get_batch": get_batch, "forward_step": trainers_step, "config": None}
    called = bridge()
    names = snippet.run(names) if snippet else names
    step, reported, computed = names[step], set(), []
    if called:
        (bridged,) = called
        step = partial(bridged, None)  # Bridge binds its state in this way

    def watched(data_iterator, model):
        output, loss_func = step(data_iterator, model, return_schedule_plan=False)
        computed.append(int((output != 0).sum()) if output.dim() == 2 else None)

        def watching(output_tensor):
            *result, report = loss_func(output_tensor)
            reported.update(report)
            return *result, report

        return output, watching

    model, loss, tokens = run_schedule(watched, make_batches(), cp=cp)
    grads = {name: parameter.main_grad for name, parameter in model.module.named_parameters()}
    return loss, tokens, grads, reported, None if None in computed else sum(computed)


MEGATRON = {  # snippet -> (name of its forward step, context-parallel size)
    ("README.md", "trainer"): ("fused_forward_step", 1),
    ("docs/megatron.md", "pretrain"): ("fused_forward_step", 1),
    ("docs/megatron.md", "bridge"): ("fused_forward_step", 1),
    ("docs/megatron.md", "own step"): ("forward_step", 1),
    ("docs/megatron.md", "tuple"): ("forward_step", 1),
    ("docs/megatron.md", "tuple of ten"): ("forward_step", 1),
    ("docs/megatron.md", "loss func"): ("forward_step", 1),
    ("docs/megatron.md", "report"): ("forward_step", 1),
    ("docs/megatron.md", "context parallel"): ("forward_step", 2),
    ("docs/megatron.md", "head"): ("forward_step", 1),
    ("docs/megatron.md", "linear head"): ("forward_step", 1),
}


@pytest.fixture(scope="module")
def megatrons_own():
    """The same run with Megatron's own cross-entropy."""
    return run_ranks(1, in_megatron, None, "forward_step", 1)[0]


def check_megatron(snippet, step, cp, own, reported=("lm loss",)):
    """Loss, gradients and reports are those of Megatron's own loss; masked rows are not computed"""
    ranks = run_ranks(cp, in_megatron, snippet, step, cp)
    loss, tokens, grads, *_ = own
    assert sum(rank[1] for rank in ranks) == tokens
    assert sum(rank[0] for rank in ranks) == pytest.approx(loss, rel=1e-5)
    for key, grad in ranks[0][2].items():
        torch.testing.assert_close(grad, grads[key], **CLOSE)
    assert ranks[0][3] == set(reported)
    assert ranks[0][4] in (None, tokens)


@pytest.mark.parametrize("page, name", MEGATRON)
def test_megatron_snippet(page, name, megatrons_own):
    step, cp = MEGATRON[page, name]
    reported = ("lm loss", "accuracy", "entropy") if name == "report" else ("lm loss",)
    check_megatron(SNIPPETS[page, name], step, cp, megatrons_own, reported)


def test_primus_patches(megatrons_own):
    check_megatron(PrimusPatches(), "forward_step", 1, megatrons_own)

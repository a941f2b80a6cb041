"""Promise: torch.compile(fullgraph=True) works and torch.library.opcheck passes."""

import pytest
import torch
from backends import BUILT, using
from cases import build

import fused_sft_loss as fsl
from fused_sft_loss.backends.contract import normalizer_like
from fused_sft_loss.rowmath import RowMath


@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "softcap": 9.0, "vocab_size": 900}], ids=str
)
def test_compiled_step_equals_the_eager_one(backend, dynamic, inplace, options):
    torch._dynamo.reset()

    def step(x, labels, mask):
        logits = x * 1.5
        return fsl.sft_loss(
            logits, labels, mask, backend=backend, inplace_backward=inplace, **options
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seed, s in enumerate([5, 9]):
        case = build("bsv", torch.float32, 2, s, 1000, seed, "float", options)
        eager, traced = (case.storage.clone().requires_grad_() for _ in range(2))
        want = step(eager, case.labels, case.loss_mask)
        got = compiled(traced, case.labels, case.loss_mask)
        (want * 0.7).backward()
        (got * 0.7).backward()
        assert torch.equal(got, want) and torch.equal(traced.grad, eager.grad)


def test_compiled_module_and_metrics():
    torch._dynamo.reset()
    case = build("bsv", torch.bfloat16, 2, 5, 1000, 0, "float", {})
    module = fsl.SFTLoss(z_loss=1e-4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    args = case.storage, case.labels, case.loss_mask
    assert torch.equal(compiled(*args), module(*args))
    metrics = torch.compile(fsl.token_metrics, fullgraph=True, backend="aot_eager")
    for got, want in zip(metrics(*args), fsl.token_metrics(*args), strict=True):
        assert torch.equal(got, want)


def test_compiled_with_inductor():
    """Inductor, the default compiler. It is slow, so there is one test."""
    torch._dynamo.reset()
    case = build("bsv", torch.float32, 2, 5, 1000, 0, "float", {})
    leaf, again = (case.storage.clone().requires_grad_() for _ in range(2))

    def step(x):
        return fsl.sft_loss(x * 1.0, case.labels, case.loss_mask)

    loss = torch.compile(step, fullgraph=True)(leaf)
    loss.backward()
    want = step(again)
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-6, atol=1e-9)


def operator_arguments(backend):
    math = RowMath(0, 90, label_smoothing=0.1, z_loss=1e-3, softcap=20.0, logit_scale=1.5)
    logits = torch.randn(2, 3, 100, requires_grad=True)
    target, weight = torch.randint(0, 90, (6,)), torch.rand(6)
    weight[2] = 0
    rest = (normalizer_like(weight).uniform_(1, 2), *math.packed(), backend)
    gradient, of_mean = (target, weight, None, *rest), (target, weight, weight.sum(), *rest)
    labels, mask = torch.randint(0, 90, (2, 3)), torch.rand(2, 3)
    scoring = (labels, mask, torch.tensor([0, 4, 6]), True, -100, False)
    given, plain = (*scoring, *math.packed()), logits.detach()
    hot = (*scoring, *RowMath(0, 90, logit_scale=1.5).packed())
    rows, grads = torch.rand(6) + 0.5, torch.randn(2, 6)
    of_logprobs = (target, weight, rest[0], torch.rand(6), rows, *hot[len(scoring) :], backend)
    return {
        "row_targets": (*scoring[:-1], True, 90, backend),
        "loss": (plain, *given, "none", "loss", "", backend),
        "loss_and_metrics": (plain, *given, "none", "loss", "", backend),
        "differentiable_loss": (logits, *given, "mean", "loss", "", backend, False),
        "differentiable_loss_and_metrics": (logits, *given, "none", "loss", "", backend, False),
        "row_grad": (plain, torch.randn(6), *gradient),
        "row_grad_": (plain.clone(), torch.tensor(0.5), *of_mean),
        "logprobs": (plain, *hot, rows, True, "logprobs", "", backend),
        "differentiable_logprobs": (logits, *hot, None, True, "logprobs", "", backend, False),
        "logprob_grad": (plain, *grads, *of_logprobs),
        "logprob_grad_": (plain.clone(), None, grads[1], *of_logprobs),
        "token_metrics": (plain, *given, "metrics", "", backend),
    }


OPERATORS = [*operator_arguments("eager")]


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator, name):
    with using(name) as backend:
        args = operator_arguments(backend)[operator]
        torch.library.opcheck(getattr(torch.ops.fused_sft_loss, operator).default, args)

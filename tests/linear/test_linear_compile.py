"""Promise: torch.compile(fullgraph=True) works, and torch.library.opcheck passes."""

import pytest
import torch
from backends import BUILT
from linear_cases import build
from tiers import sampled

import fused_sft_loss as fsl
from fused_sft_loss.rowmath import RowMath

schedules = pytest.mark.parametrize("one_pass", [False, 0.7])


def compared(step, compiled, case):
    """A plain and a compiled step have the same bits."""
    results = []
    for run in (step, compiled):
        leaves = [t.clone().requires_grad_() for t in (case.storage, case.weight, case.bias)]
        loss = run(*leaves, case.labels, case.loss_mask)
        (loss.sum() * 0.7).backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def step_with(**options):
    def step(hidden, weight, bias, labels, mask):
        return fsl.linear_sft_loss(hidden * 1.5, weight, labels, mask, bias=bias, **options)

    return step


@schedules
@pytest.mark.parametrize("reduction", sampled(["mean", "none"], ["none"]))
@pytest.mark.parametrize("dynamic", sampled([False, True], [False]))
@pytest.mark.parametrize("backend", sampled(BUILT, ["cpu"]))
def test_a_fixed_number_of_rows_is_one_graph(backend, dynamic, reduction, one_pass):
    torch._dynamo.reset()
    step = step_with(
        rows=16, grad_in_forward=one_pass, reduction=reduction, softcap=9.0, backend=backend
    )
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seed, s in enumerate([5, 8]):
        case = build("bsv", torch.float32, 2, s, 8, 1100, seed, "float", {})
        assert compared(step, compiled, case)


@schedules
def test_frozen_weight_in_a_compiled_step(one_pass):
    torch._dynamo.reset()
    case = build("bsv", torch.bfloat16, 2, 6, 8, 1100, 3, "float", {})
    compiled = torch.compile(
        lambda hidden: fsl.linear_sft_loss(
            hidden * 1.5, case.weight, case.labels, rows=12, grad_in_forward=one_pass
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    leaf, plain = (case.storage.clone().requires_grad_() for _ in range(2))
    compiled(leaf).backward(torch.tensor(0.7))
    fsl.linear_sft_loss(plain * 1.5, case.weight, case.labels).backward(torch.tensor(0.7))
    torch.testing.assert_close(leaf.grad, plain.grad)


@schedules
def test_without_rows_the_graph_breaks_where_the_number_is_read(one_pass):
    torch._dynamo.reset()
    step = step_with(grad_in_forward=one_pass)
    case = build("bsv", torch.float32, 2, 6, 8, 1100, 1, "float", {})
    assert compared(step, torch.compile(step, backend="aot_eager"), case)


@pytest.mark.long
def test_with_inductor():
    """Inductor, the default compiler. It is slow, so there is one test."""
    torch._dynamo.reset()
    case = build("bsv", torch.float32, 2, 6, 8, 100, 1, "float", {})
    step = step_with(rows=12, grad_in_forward=True)
    leaves, plain = ([t.clone().requires_grad_() for t in (case.storage, case.weight, case.bias)]
                     for _ in range(2))  # fmt: skip
    torch.compile(step, fullgraph=True)(*leaves, case.labels, case.loss_mask).backward()
    step(*plain, case.labels, case.loss_mask).backward()
    for got, want in zip(leaves, plain, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-5, atol=1e-7)


@schedules
def test_fake_tensors_have_the_shapes_of_the_real_ones(one_pass):
    from torch._subclasses import FakeTensorMode

    case = build("bsv", torch.bfloat16, 2, 6, 8, 100, 1, "float", {})
    with FakeTensorMode() as mode:
        leaves = [
            mode.from_tensor(t).requires_grad_() for t in (case.storage, case.weight, case.bias)
        ]
        labels, mask = mode.from_tensor(case.labels), mode.from_tensor(case.loss_mask)
        for reduction, shape in (("none", (2, 6)), ("mean", ())):
            loss = step_with(rows=9, grad_in_forward=one_pass, reduction=reduction)(
                *leaves, labels, mask
            )
            assert loss.shape == shape and loss.dtype == torch.float32
            for grad, leaf in zip(torch.autograd.grad(loss.sum(), leaves), leaves, strict=True):
                assert grad.shape == leaf.shape and grad.dtype == leaf.dtype


def operator_arguments(backend, dtype):
    math = RowMath(0, 90, label_smoothing=0.1, z_loss=1e-3, softcap=20.0, logit_scale=1.5)
    hidden, weight, bias = (
        torch.randn(shape).to(dtype).requires_grad_() for shape in ((6, 8), (100, 8), (100,))
    )
    positions, target = torch.tensor([4, 0, 2, 5]), torch.randint(0, 90, (4,))
    row_weight = torch.tensor([0.5, 1.0, 2.0, 0.0])
    rows = (positions, target, row_weight, row_weight.sum())
    plain = (hidden.detach(), weight.detach(), bias.detach(), *rows)
    labels, mask, bounds = torch.randint(0, 90, (2, 3)), torch.rand(2, 3), torch.tensor([0, 4, 6])
    scoring = (labels, mask, bounds, True, -100, False)
    options = (*math.packed(), 150, "mean", "", backend)
    wanted, upstream = [True, True, True], torch.tensor(0.5)
    held = torch.randn(4, 8).to(dtype), torch.randn(100, 8), torch.randn(100)
    return {
        "linear_targets": (*scoring, plain[0], *math.packed(), 100, "loss", "", backend),
        "linear_loss": (*plain, *options),
        "linear_loss_and_metrics": (*plain, *math.packed(), 150, "none", "", backend),
        "linear_grad": (
            *plain, upstream, torch.rand(4, 2) + 1, *math.packed(), 150, "mean", wanted, "",
            backend,
        ),
        "linear_losses_and_gradients": (*plain, upstream, *math.packed(), 3, wanted, "", backend),
        "linear_grad_of_hidden": (
            plain[0], positions, row_weight, held[0], torch.rand(4), "",
        ),
        "differentiable_linear_loss": (hidden, weight, bias, *rows, *options, "", False),
        "differentiable_linear_loss_and_metrics": (
            hidden, weight, bias, *rows, *math.packed(), 150, "none", "", backend, "", False,
        ),
        "linear_with_gradients": (
            hidden, weight, bias, torch.randn(4), positions, row_weight, upstream, *held, "", False,
        ),
    }  # fmt: skip


OPERATORS = [*operator_arguments("eager", torch.float32)]


@pytest.mark.parametrize("dtype", sampled([torch.float32, torch.bfloat16], [torch.bfloat16]))
@pytest.mark.parametrize("backend", sampled(BUILT, ["cpu"]))
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator, backend, dtype):
    args = operator_arguments(backend, dtype)[operator]
    torch.library.opcheck(getattr(torch.ops.fused_sft_loss, operator).default, args)


def test_opcheck_of_gradients_that_are_not_wanted():
    for wanted in ([False, True, False], [True, False, False], [False, False, True]):
        for name in ("linear_grad", "linear_losses_and_gradients"):
            args = list(operator_arguments("eager", torch.float32)[name])
            args[args.index([True, True, True])] = wanted
            torch.library.opcheck(getattr(torch.ops.fused_sft_loss, name).default, tuple(args))

"""Promise: grad_in_forward gives loss and gradient from one read, for any upstream gradient."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from backends import ON_CPU, on_shim, using
from cases import DTYPES, Case, build, cases, expected, largest_term, storage_grad
from closeness import PRODUCT, assert_grad, assert_losses
from hypothesis import given, settings
from tiers import sampled
from torch.library import opcheck

import fused_sft_loss as fsl
from bench.without_gpu.simt import build as build_shim
from fused_sft_loss.backends import selection
from fused_sft_loss.rowmath import RowMath

ONE_READ = [name for name in ON_CPU if name.partition("-")[0] in selection.ONE_READ]
if not ONE_READ:
    pytest.skip("neither native kernels nor the SIMT shim here", allow_module_level=True)

VIEWS = ("bsv", "sbv", "sliced", "offset", "nv")
EXPECTED = 0.75  # an upstream gradient that is not 1
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # bound of one rounding
FEWER = settings(PRODUCT, max_examples=40)


class Step:
    """A forward on logits that own their memory, as a model's do, and the gradient they receive."""

    def __init__(self, case: Case, backend: str, **options):
        self.logits = case.logits(case.storage.clone().requires_grad_() * 1)
        self.grads = []
        # Register before the loss: autograd may lose track of a view that is written to.
        self.logits.register_hook(self.grads.append)
        self.result = fsl.sft_loss(
            self.logits,
            case.labels,
            case.loss_mask,
            backend=backend,
            **{"grad_in_forward": EXPECTED, "reduction": "none", **case.call_options(), **options},
        )

    def backward(self, upstream=None):
        """The gradient of the logits."""
        self.result.backward(upstream)
        (grad,) = self.grads
        return grad


def one_read(case: Case, backend: str, upstream, **options):
    """(result, gradient of the logits)."""
    step = Step(case, backend, **options)
    upstream = torch.as_tensor(upstream).expand(case.labels.numel()).view_as(step.result)
    return step.result.detach(), step.backward(upstream)


def by_rows(case: Case, grad):
    """The gradient as batch-major rows `[N, v]`."""
    return (grad.transpose(0, 1) if case.view == "sbv" else grad).reshape(-1, case.columns)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", sampled(ONE_READ, set(ONE_READ) - {"cpu-baseline"}))
@settings(PRODUCT, max_examples=70)
@given(case=cases(views=VIEWS))
def test_losses_and_gradients_over_the_option_product(backend, inplace, case):
    upstream = torch.full((case.labels.numel(),), EXPECTED)
    want = expected(case, upstream)
    with using(backend) as name:
        losses, grad = one_read(case, name, upstream, inplace_backward=inplace)
    assert_losses(losses, want)
    largest = largest_term(case, want, upstream)
    wanted = case.logits(storage_grad(case, want.grad))
    assert_grad(grad, wanted, case.storage.dtype, largest)


@pytest.mark.parametrize("backend", ONE_READ)
@FEWER
@given(case=cases(dtypes=(torch.bfloat16, torch.float16), views=VIEWS))
def test_gradient_is_the_fp32_gradient_rounded_once(backend, case):
    with using(backend) as name:
        losses, grad = one_read(case, name, EXPECTED)
        exact = replace(case, storage=case.storage.float())
        losses32, grad32 = one_read(exact, name, EXPECTED)
    assert torch.equal(losses, losses32)
    assert torch.equal(grad, grad32.to(grad.dtype))


@pytest.mark.parametrize("backend", ONE_READ)
@FEWER
@given(case=cases(views=VIEWS))
def test_another_upstream_gradient_is_exact_from_a_buffer(backend, case):
    """Surprised rows have the same bits as if their upstream gradient had been expected."""
    surprised = torch.rand(case.labels.numel()) < 0.5
    upstream = torch.where(surprised, -0.4, EXPECTED)
    with using(backend) as name:
        _, grad = one_read(case, name, upstream)
        _, as_expected = one_read(case, name, EXPECTED)
        _, otherwise = one_read(case, name, -0.4, grad_in_forward=-0.4)
    wanted = torch.where(
        surprised.unsqueeze(-1), by_rows(case, otherwise), by_rows(case, as_expected)
    )
    assert torch.equal(by_rows(case, grad), wanted)


@pytest.mark.parametrize("backend", ONE_READ)
@FEWER
@given(case=cases(dtypes=(torch.float32, torch.bfloat16), views=VIEWS))
def test_another_upstream_gradient_in_place_is_rounded_twice_at_most(backend, case):
    """There is no second rounding if it is a power of two times the expected gradient."""
    with using(backend) as name:
        _, wanted = one_read(case, name, -0.4, grad_in_forward=-0.4)
        _, grad = one_read(case, name, -0.4, inplace_backward=True)
        _, twice = one_read(case, name, 2 * EXPECTED, inplace_backward=True)
        _, once = one_read(case, name, EXPECTED)
        _, never = one_read(case, name, 0.0, inplace_backward=True)
    rounding = (
        EPS[case.storage.dtype] * 2 + 2**-22
    )  # two, plus rounding of the ratio and the factor
    torch.testing.assert_close(grad, wanted, rtol=rounding, atol=1e-6)
    assert torch.equal(twice, once * 2)
    assert not never.count_nonzero()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("backend", ONE_READ)
def test_what_forward_stored_is_what_backward_gives(backend, reduction, inplace):
    """The logits' data becomes NaN unseen by autograd, so backward cannot compute from them."""
    case = build("bsv", torch.bfloat16, 2, 6, 1003, 1, "float", {})
    plain = case.storage.clone().requires_grad_()
    with using(backend) as name:
        loss = fsl.sft_loss(plain, case.labels, case.loss_mask, reduction=reduction, backend=name)
        loss.backward()
        step = Step(case, name, reduction=reduction, grad_in_forward=True, inplace_backward=inplace)
        if inplace:
            assert torch.equal(step.logits, plain.grad)
        else:
            step.logits.data.fill_(torch.nan)
        grad = step.backward()
    torch.testing.assert_close(step.result, loss, rtol=1e-6, atol=0)
    assert torch.equal(grad, plain.grad)
    assert (grad.data_ptr() == step.logits.data_ptr()) == inplace


@pytest.mark.parametrize("scale", [1024.0, torch.tensor(1024.0)], ids=["number", "tensor"])
def test_an_expected_loss_scale(scale):
    """Without the scale, fp16 gradients of a mean would be subnormal. Nothing is rescaled."""
    case = build("bsv", torch.float16, 2, 40, 1003, 1, "none", {})
    with using(ONE_READ[0]) as name:
        step = Step(case, name, reduction="mean", grad_in_forward=scale, inplace_backward=True)
        stored = step.logits.detach().clone()
        grad = step.backward(torch.tensor(1024.0))
    want = expected(case)
    wanted = want.grad.view_as(stored) * 1024 / want.weight.sum()
    assert torch.equal(grad, stored)
    assert_grad(grad, wanted, torch.float16, wanted.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", ["bsv", "sliced"])
@pytest.mark.parametrize(
    ("vendor", "chip"), [("cuda", (80, 108)), ("cuda", (90, 132)), ("hip", (0x942, 304))], ids=str
)
def test_rows_that_do_not_fit_on_the_chip(vendor, chip, dtype, view):
    """Without clusters, or with registers for half of a row only, the rest is read twice."""
    if f"{vendor}-simt" not in ON_CPU:
        pytest.skip(f"the SIMT shim cannot be compiled: {build_shim.missing()}")
    options = {"label_smoothing": 0.1, "vocab_size": 299_995}
    options |= {"softcap": 30.0} if vendor == "cuda" else {}
    case = build(view, dtype, 1, 2, 300_003, 3, "none", {**options, "shift": False})
    want = expected(case)
    with on_shim(vendor, chip):
        losses, grad = one_read(case, vendor, 1.0, grad_in_forward=True, inplace_backward=True)
        _, apart = one_read(case, vendor, 1.0, grad_in_forward=True)
    assert_losses(losses, want)
    assert_grad(grad, case.logits(storage_grad(case, want.grad)), dtype, want.weight.max().item())
    assert torch.equal(grad, apart)


@pytest.mark.parametrize("cap", [30.0, 50.0])
@pytest.mark.parametrize("vendor", ["cuda", "hip"])
def test_a_softcap_on_amd_takes_two_reads(vendor, cap):
    """There the rows' registers leave no room for it. The bits are those of an ordinary call."""
    if f"{vendor}-simt" not in ON_CPU:
        pytest.skip(f"the SIMT shim cannot be compiled: {build_shim.missing()}")
    case = build("bsv", torch.bfloat16, 2, 3, 9001, 2, "float", {"softcap": cap})
    with on_shim(vendor):
        kernels = selection.load(vendor)
        with mock.patch.object(kernels, "module", wraps=kernels.module) as module:
            losses, grad = one_read(case, vendor, 1.0, grad_in_forward=True)
            _, same = one_read(case, vendor, 1.0, grad_in_forward=True, inplace_backward=True)
        assert module.row_stats_grad.called == (vendor == "cuda")
        assert module.row_stats.called == (vendor == "hip")
        wanted, wanted_grad = one_read(case, vendor, 1.0, grad_in_forward=False)
    if vendor == "hip":
        assert torch.equal(losses, wanted) and torch.equal(grad, wanted_grad)
    assert_losses(losses, expected(case))
    assert torch.equal(grad, same)


@pytest.mark.parametrize("backend", ONE_READ)
def test_masked_out_columns_and_rows(backend):
    """-inf columns, a leading tile of -inf, and NaN in an unscored and in a scored row."""
    case = build("bsv", torch.float32, 1, 4, 20000, 2, "none", {"shift": False})
    case.labels = torch.tensor([[15000, 17000, -100, 9]])
    case.storage[0, :2, :14000] = -torch.inf
    case.storage[0, 2:, 5] = torch.nan
    want = expected(replace(case, labels=torch.tensor([[15000, 17000, -100, -100]])))
    with using(backend) as name:
        losses, grad = one_read(case, name, 1.0, grad_in_forward=True, inplace_backward=True)
    torch.testing.assert_close(losses[0, :2].double(), want.losses[:2], rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[0, :2].double(), want.grad[:2], rtol=0, atol=2e-6)
    assert losses[0, 2] == 0 and not grad[0, 2].count_nonzero()
    assert losses[0, 3].isnan() and grad[0, 3].isnan().any()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", ONE_READ)
def test_all_tokens_masked(backend, inplace):
    case = build("bsv", torch.bfloat16, 2, 3, 1000, 2, "empty", {})
    with using(backend) as name:
        step = Step(case, name, reduction="mean", inplace_backward=inplace)
        grad = step.backward()
    assert step.result == 0 and not grad.count_nonzero()


@pytest.mark.parametrize("backend", ONE_READ)
def test_an_upstream_gradient_that_is_no_number_leaves_padding_alone(backend):
    case = build("bsv", torch.bfloat16, 1, 2, 50, 2, "none", {"vocab_size": 45, "shift": False})
    case.labels = torch.tensor([[3, 9]])
    with using(backend) as name:
        payload = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
        for nan in (torch.tensor(torch.nan), payload):
            _, grad = one_read(case, name, nan, inplace_backward=True)
            assert grad[..., :45].isnan().all() and not grad[..., 45:].count_nonzero()


@pytest.mark.parametrize("inplace", [False, True])
def test_backward_runs_once(inplace):
    case = build("bsv", torch.float32, 1, 3, 100, 2, "none", {})
    with using(ONE_READ[0]) as name:
        loss = Step(case, name, reduction="sum", inplace_backward=inplace).result
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_whoever_saved_the_logits_learns_that_they_are_gone():
    case = build("bsv", torch.float32, 1, 3, 100, 2, "none", {})
    leaf = case.storage.clone().requires_grad_()
    with using(ONE_READ[0]) as name:
        logits = leaf.exp()  # exp saves its result
        loss = fsl.sft_loss(
            logits, case.labels, backend=name, grad_in_forward=True, inplace_backward=True
        )
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_without_a_gradient_to_compute_nothing_is_written(inplace):
    case = build("bsv", torch.float32, 1, 3, 100, 2, "none", {})
    options = {"grad_in_forward": True, "inplace_backward": inplace}
    with using(ONE_READ[0]) as name:
        want = fsl.sft_loss(case.storage, case.labels, backend=name)
        before = case.storage.clone()
        assert torch.equal(fsl.sft_loss(case.storage, case.labels, backend=name, **options), want)
        leaf = case.storage.clone().requires_grad_()
        with torch.no_grad():
            got = fsl.sft_loss(leaf * 1, case.labels, backend=name, **options)
        assert torch.equal(got, want)
    assert torch.equal(case.storage, before)


def test_a_leaf_is_refused_in_place():
    leaf = torch.randn(1, 3, 100, requires_grad=True)
    with using(ONE_READ[0]) as name, pytest.raises(ValueError, match="non-leaf"):
        fsl.sft_loss(
            leaf,
            torch.zeros(1, 3, dtype=torch.long),
            backend=name,
            grad_in_forward=True,
            inplace_backward=True,
        )


@pytest.mark.parametrize(
    "value", [torch.nan, torch.inf, "yes", torch.ones(1), torch.tensor(1)], ids=str
)
def test_what_is_no_gradient_is_refused(value):
    with pytest.raises(ValueError, match="grad_in_forward False, True, a finite number or a 0-d"):
        fsl.SFTLoss(grad_in_forward=value)


def test_a_backend_without_the_kernels_is_refused_by_name():
    logits, labels = torch.randn(1, 3, 10, requires_grad=True), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(NotImplementedError, match=r"backend='eager' has no kernel.*cpu, cuda, hip"):
        fsl.sft_loss(logits, labels, backend="eager", grad_in_forward=True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("expect", [True, EXPECTED])
def test_compiled_step_equals_the_eager_one(dynamic, expect):
    torch._dynamo.reset()
    options = {"grad_in_forward": expect, "softcap": 9.0}

    def step(x, labels, mask):
        return fsl.sft_loss(x * 1.5, labels, mask, backend=name, **options)

    with using(ONE_READ[0]) as name:
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for seed, s in enumerate([5, 9]):
            case = build("bsv", torch.float32, 2, s, 1000, seed, "float", options)
            eager, traced = (case.storage.clone().requires_grad_() for _ in range(2))
            want = step(eager, case.labels, case.loss_mask)
            got = compiled(traced, case.labels, case.loss_mask)
            (want * EXPECTED).backward()
            (got * EXPECTED).backward()
            assert torch.equal(got, want) and torch.equal(traced.grad, eager.grad)


def test_opcheck():
    case = build("bsv", torch.float32, 2, 3, 50, 0, "float", {})
    logits = case.storage.clone()
    target, weight = torch.randint(0, 50, (6,)), torch.rand(6)
    math = RowMath(0, 50, label_smoothing=0.1, z_loss=1e-3, softcap=9.0, logit_scale=1.5)
    ops = torch.ops.fused_sft_loss
    with using(ONE_READ[0]) as name:
        call = (logits, target, weight, weight, *math.packed(), name)
        opcheck(ops.row_stats_grad, call)
        opcheck(ops.row_stats_grad_, call)
        losses, normalizer, grad = ops.row_stats_grad(*call)
        leaf = logits.clone().requires_grad_()
        for held in (grad, None):
            opcheck(
                ops.with_grad,
                (leaf, losses, held, target, weight, normalizer, weight, *math.packed(), name),
                # No test_aot_dispatch_dynamic: backward may overwrite its input, so it runs once.
                test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
            )
        again = (grad, weight * 2, logits, target, weight, normalizer, weight, *math.packed(), name)
        opcheck(ops.row_regrad_, again)
        opcheck(ops.row_rescale_, (grad, weight * 2, weight, weight, *math.packed(), name))

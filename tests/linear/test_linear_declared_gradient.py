"""Promise: with grad_in_forward another upstream gradient is right, or the gradient is NaN."""

import pytest
import torch
from linear_cases import build, gradients

import fused_sft_loss as fsl
from fused_sft_loss.linear import one_pass

DECLARED = 0.75
CASE = build("bsv", torch.float32, 2, 6, 8, 1100, 11, "float", {})


def leaves(case=CASE):
    return [t.clone().requires_grad_() for t in (case.storage, case.weight, case.bias)]


def grads(loss, upstream, given):
    return torch.autograd.grad(loss, given, torch.as_tensor(upstream).expand_as(loss))


def assert_close(got, want, rtol=1e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-6 * b.abs().max().item())


@pytest.mark.parametrize("declared", [True, DECLARED, torch.tensor(DECLARED), 1e30, 1e-30, 0.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("upstream", [1.0, DECLARED, -0.3, 0.0, 4096.0])
def test_a_uniform_upstream_gradient_is_right_whatever_was_declared(upstream, reduction, declared):
    given, plain = leaves(), leaves()
    loss = CASE.call(*given, reduction=reduction, grad_in_forward=declared)
    want = CASE.call(*plain, reduction=reduction)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    assert_close(grads(loss, upstream, given), grads(want, upstream, plain))


def test_a_declared_tensor_of_0_is_stored_for_1():
    given, plain = leaves(), leaves()
    loss = CASE.call(*given, reduction="sum", grad_in_forward=torch.tensor(0.0))
    assert_close(grads(loss, 2.0, given), grads(CASE.call(*plain, reduction="sum"), 2.0, plain))


def test_the_declared_gradient_is_given_without_a_second_rounding():
    """What is stored in bf16 is what an upstream gradient as declared gives, bit by bit."""
    case = build("bsv", torch.bfloat16, 2, 6, 8, 1100, 11, "float", {})
    upstream = torch.full((12,), DECLARED)
    declared = gradients(case, upstream, grad_in_forward=DECLARED)
    doubled = gradients(case, upstream * 2, grad_in_forward=DECLARED)
    for once, twice in zip(declared[1:], doubled[1:], strict=True):
        assert torch.equal(once * 2, twice)


def test_trap_an_upstream_gradient_of_each_row_cannot_correct_a_sum_over_rows():
    given, plain = leaves(), leaves()
    upstream = torch.rand(2, 6) + 0.5
    losses = CASE.call(*given, reduction="none", grad_in_forward=True)
    hidden, weight, bias = torch.autograd.grad(losses, given, upstream)
    want = torch.autograd.grad(CASE.call(*plain, reduction="none"), plain, upstream)
    assert_close([hidden], want[:1])
    assert weight.isnan().all() and bias.isnan().all()


def test_upstream_gradients_of_unscored_rows_do_not_count():
    given, plain = leaves(), leaves()
    losses = CASE.call(*given, reduction="none", grad_in_forward=True, rows=12)
    upstream = torch.where(losses == 0, torch.nan, 1.0)
    want = torch.autograd.grad(CASE.call(*plain, reduction="none"), plain, torch.ones(2, 6))
    assert_close(torch.autograd.grad(losses, given, upstream), want)


@pytest.mark.parametrize("upstream", [torch.inf, -torch.inf, torch.nan])
def test_an_upstream_gradient_that_is_not_finite_is_not_hidden(upstream):
    given = leaves()
    loss = CASE.call(*given, grad_in_forward=True)
    found = grads(loss, upstream, given)
    scored = grads(CASE.call(*given), 1.0, given)[0].abs().sum(-1) != 0
    assert not found[0][scored].isfinite().any() and not found[0][~scored].count_nonzero()
    assert not found[1].isfinite().any() and not found[2].isfinite().any()


def test_trap_a_loss_scale_that_was_not_declared_in_fp16():
    """The mean's gradient of hidden is below the normal numbers of fp16, until the upstream
    gradient lifts it. If it had been rounded to fp16 before, its digits would be lost."""
    case = build("bsv", torch.float16, 4, 512, 8, 100, 1, "none", {})
    case.weight /= 64
    given, plain = leaves(case), leaves(case)
    found = grads(case.call(*given, grad_in_forward=True), 65536.0, given)
    want = grads(case.call(*plain), 65536.0, plain)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-3 * b.float().abs().mean().item())


def test_without_a_gradient_to_compute_none_is(monkeypatch):
    monkeypatch.setattr(one_pass, "losses_and_gradients", None)
    tensors = (CASE.storage, CASE.weight, CASE.bias)
    want = CASE.call(*tensors)
    assert torch.equal(CASE.call(*tensors, grad_in_forward=True), want)
    with torch.no_grad():
        assert torch.equal(CASE.call(*leaves(), grad_in_forward=True), want)
    with torch.inference_mode():
        assert torch.equal(CASE.call(*tensors, grad_in_forward=True), want)


@pytest.mark.parametrize("declared", [False, True, DECLARED])
def test_a_second_backward_gives_the_same_bits(declared):
    given = leaves()
    loss = CASE.call(*given, grad_in_forward=declared)
    first = torch.autograd.grad(loss, given, torch.tensor(DECLARED), retain_graph=True)
    second = torch.autograd.grad(loss, given, torch.tensor(DECLARED))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def hessian_of_hidden(loss):
    hidden, weight, _ = leaves()
    (grad,) = torch.autograd.grad(loss(hidden, weight.detach()), hidden, create_graph=True)
    grad.square().sum().backward()


def hessian_of_weight(loss):
    hidden, weight, _ = leaves()
    (grad,) = torch.autograd.grad(loss(hidden.detach(), weight), weight, create_graph=True)
    grad.square().sum().backward()


def mixed(loss):
    hidden, weight, _ = leaves()
    (grad,) = torch.autograd.grad(loss(hidden, weight), hidden, create_graph=True)
    torch.autograd.grad(grad.sum(), weight)


def of_torch_func(loss):
    hidden, weight, _ = (t.detach() for t in leaves())
    torch.func.grad(lambda w: torch.func.grad(lambda v: loss(hidden, v))(w).sum())(weight)


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("way", [hessian_of_hidden, hessian_of_weight, mixed, of_torch_func])
def test_a_second_derivative_is_refused_not_zero(way, declared):
    with pytest.raises(NotImplementedError, match="expected one derivative"):
        way(lambda h, w: fsl.linear_sft_loss(h, w, CASE.labels, grad_in_forward=declared))


@pytest.mark.parametrize("declared", [False, True])
def test_torch_func_grad(declared):
    hidden, weight, _ = leaves()
    fsl.linear_sft_loss(hidden * 1.5, weight, CASE.labels).backward()
    grads = torch.func.grad(
        lambda h, w: fsl.linear_sft_loss(h * 1.5, w, CASE.labels, grad_in_forward=declared), (0, 1)
    )(hidden.detach(), weight.detach())
    assert_close(grads, (hidden.grad, weight.grad))

"""Promise: the gradient of the weight is a sum in fp32 that is rounded once, wherever it goes."""

from unittest import mock

import pytest
import torch
from linear_cases import build

from fused_sft_loss.linear import products
from fused_sft_loss.linear.call import Sizes, prepared
from fused_sft_loss.options import Options

schedules = pytest.mark.parametrize("one_pass", [False, True])
ROWS = 64


def case_of(dtype):
    case = build("bsv", dtype, 1, ROWS, 8, 1100, 3, "none", {"shift": False})
    case.labels.clamp_(min=0)
    return case


def fused(case, weight, one_pass=False, hidden=None, bias=None, **sizes):
    """The call as a Megatron layer makes it, with the gradient of weight into its main_grad."""
    hidden = case.storage if hidden is None else hidden
    options = Options(grad_in_forward=one_pass, shift=False)
    given = (hidden, weight, bias, case.labels, None, options, "loss", Sizes(**sizes), False)
    return prepared(*given, into_main_grad=True).loss("sum")


def exact(case, upstream=1.0):
    """The gradients of the weight and of the bias in float64."""
    hidden = case.storage.double().flatten(0, 1)
    weight = case.weight.double().requires_grad_()
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(
        hidden @ weight.t() + bias, case.labels.flatten(), reduction="sum"
    )
    return torch.autograd.grad(loss * upstream, (weight, bias))


@schedules
@pytest.mark.parametrize("chunk_rows", [1, 2, ROWS], ids=["64 chunks", "32 chunks", "1 chunk"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trap_a_sum_over_chunks_in_16_bits(dtype, chunk_rows, one_pass):
    case = case_of(dtype)
    weight, bias = case.weight.clone().requires_grad_(), torch.zeros(1100, dtype=dtype)
    bias.requires_grad_()
    loss = case.call(
        case.storage,
        weight,
        bias,
        reduction="sum",
        chunk_rows=chunk_rows,
        grad_in_forward=one_pass,
    )
    loss.backward()
    if products.dtype_of_products(weight) != torch.float32:
        pytest.skip("the logits' gradient is rounded to 16 bits too")
    half = torch.finfo(dtype).eps / 2
    for got, want in zip((weight.grad, bias.grad), exact(case), strict=True):
        error = (got.double() - want).abs()
        sum_of_fp32 = 2e-6 * want.abs().max()
        assert (error <= half * want.abs() + sum_of_fp32).all()


@schedules
@pytest.mark.parametrize("chunk_rows", [1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_add_up_in_main_grad(dtype, chunk_rows, one_pass):
    case = case_of(dtype)
    weight = case.weight.clone().requires_grad_()
    weight.main_grad = torch.zeros(weight.shape)
    weight.grad_added_to_main_grad = False
    for upstream in (1.0, 0.5):
        (fused(case, weight, one_pass, chunk_rows=chunk_rows) * upstream).backward()
    want, _ = exact(case, 1.5)
    torch.testing.assert_close(
        weight.main_grad.double(), want, rtol=1e-5, atol=4e-6 * want.abs().max().item()
    )
    assert weight.grad_added_to_main_grad is True


@schedules
def test_a_main_grad_in_bf16(one_pass):
    case = case_of(torch.bfloat16)
    weight = case.weight.clone().requires_grad_()
    weight.main_grad = torch.ones_like(weight)
    fused(case, weight, one_pass, chunk_rows=1).backward()
    want = exact(case)[0] + 1
    torch.testing.assert_close(weight.main_grad.double(), want, rtol=2**-8, atol=1e-5)


@schedules
def test_overwrite_main_grad_writes_over_what_was_there(one_pass):
    case = case_of(torch.bfloat16)
    weight = case.weight.clone().requires_grad_()
    weight.main_grad = torch.full(weight.shape, torch.nan)
    weight.overwrite_main_grad = True
    fused(case, weight, one_pass).backward()
    want, _ = exact(case)
    torch.testing.assert_close(weight.main_grad.double(), want, rtol=1e-5, atol=1e-4)


@schedules
def test_memory_that_megatron_fsdp_makes_for_a_backward(one_pass):
    case = case_of(torch.bfloat16)
    weight = case.weight.clone().requires_grad_()
    weight.__fsdp_param__ = True
    made = []
    weight.get_main_grad = lambda: made.append(torch.full(weight.shape, torch.nan)) or made[-1]
    loss = fused(case, weight, one_pass)
    assert made == []  # in backward, and not before
    loss.backward()
    (memory,) = made
    torch.testing.assert_close(memory.double(), exact(case)[0], rtol=1e-5, atol=1e-4)


@schedules
def test_padding_of_the_vocabulary_in_main_grad(one_pass):
    """A sum stays as it is there; written memory becomes 0."""
    case = case_of(torch.float32)
    case.labels %= 1000
    for overwrite in (False, True):
        weight = case.weight.clone().requires_grad_()
        weight.main_grad = torch.full(weight.shape, 7.0)
        weight.overwrite_main_grad = overwrite
        options = Options(grad_in_forward=one_pass, shift=False, vocab_size=1000)
        given = (case.storage, weight, None, case.labels, None, options, "loss", Sizes(), False)
        prepared(*given, into_main_grad=True).loss("sum").backward()
        assert (weight.main_grad[1000:] == (0.0 if overwrite else 7.0)).all()


@schedules
@pytest.mark.parametrize("flags", ["none", "added", "zero"])
def test_what_autograd_gets_for_a_weight_whose_gradient_is_in_main_grad(flags, one_pass):
    """Nothing without the optimizer's flag. With it some values, so that hooks run; or zeros."""
    case = case_of(torch.bfloat16)
    weight = case.weight.clone().requires_grad_()
    weight.main_grad = torch.zeros(weight.shape)
    if flags != "none":
        weight.grad_added_to_main_grad = False
    if flags == "zero":
        weight.zero_out_wgrad = True
    fused(case, weight, one_pass).backward()
    assert weight.main_grad.count_nonzero()
    assert (weight.grad is None) == (flags == "none")
    if flags != "none":
        assert weight.grad_added_to_main_grad and weight.grad.dtype == torch.bfloat16
    if flags == "zero":
        assert not weight.grad.count_nonzero()


@schedules
def test_a_weight_without_main_grad_is_an_error(one_pass):
    case = case_of(torch.bfloat16)
    loss = fused(case, case.weight.clone().requires_grad_(), one_pass)
    with pytest.raises(ValueError, match="expected weight.main_grad, .*DistributedDataParallel"):
        loss.backward()


@schedules
def test_the_other_gradients_are_those_of_a_call_without_main_grad(one_pass):
    case = case_of(torch.bfloat16)
    found = []
    for with_main_grad in (False, True):
        hidden, weight, bias = (
            t.clone().requires_grad_() for t in (case.storage, case.weight, case.bias)
        )
        weight.main_grad = torch.zeros(weight.shape)
        if with_main_grad:
            loss = fused(case, weight, one_pass, hidden, bias)
        else:
            loss = case.call(hidden, weight, bias, reduction="sum", grad_in_forward=one_pass)
        loss.backward()
        found.append((hidden.grad, bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@schedules
def test_trap_saved_tensor_hooks_return_a_weight_without_main_grad(one_pass):
    """Activation offloading and non-reentrant checkpointing save copies of what is saved."""
    case = case_of(torch.bfloat16)
    weight = case.weight.clone().requires_grad_()
    weight.main_grad = torch.zeros(weight.shape)
    with torch.autograd.graph.save_on_cpu():
        fused(case, weight, one_pass).backward()
    assert weight.main_grad.count_nonzero()


@schedules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_weight_costs_no_product_and_no_memory(dtype, one_pass):
    case = case_of(dtype)
    hidden = case.storage.clone().requires_grad_()
    sizes, makes = [], []

    def noted(name, first):
        original = getattr(products, name)

        def run(*args):
            sizes.append((args[first].shape[0], args[first + 1].shape[1]))
            return original(*args)

        return mock.patch.object(products, name, run)

    new = torch.Tensor.new_empty, torch.Tensor.new_zeros

    def made(make):
        def run(tensor, *shape, **how):
            result = make(tensor, *shape, **how)
            makes.append(tuple(result.shape))
            return result

        return run

    with (
        noted("multiply", 0),
        noted("accumulate", 1),
        mock.patch.object(torch.Tensor, "new_empty", made(new[0])),
        mock.patch.object(torch.Tensor, "new_zeros", made(new[1])),
    ):
        case.call(hidden, case.weight, None, grad_in_forward=one_pass).backward()
    assert hidden.grad.count_nonzero()
    assert sizes and all(rows == ROWS for rows, _ in sizes)  # no product [V, h]
    assert makes and case.weight.shape not in makes

"""Promise: every option, dtype, layout, mask and vocabulary agrees with the float64 oracle."""

import pytest
import torch
from backends import ON_CPU, using
from cases import (
    DTYPES,
    VOCABULARIES,
    build,
    cases,
    expected,
    largest_term,
    run,
    storage_grad,
)
from closeness import PRODUCT, assert_grad, assert_losses
from hypothesis import given, settings
from tiers import sampled

import fused_sft_loss as fsl

#: The shim is slow, so make test runs only its first warp size.
FAST = sampled(ON_CPU, [name for name in ON_CPU if name != "hip-simt"])


@pytest.mark.parametrize("backend", FAST)
@PRODUCT
@given(case=cases())
def test_losses_and_gradients_over_the_option_product(backend, case):
    upstream = torch.rand(case.labels.numel()) * 3 - 1
    want = expected(case, upstream)
    with using(backend) as name:
        losses, grad = run(case, name, upstream)
    assert_losses(losses, want)
    wanted_grad = storage_grad(case, want.grad)
    if case.view == "batch_expanded":  # torch adds the rounded gradients of the copies
        got, wanted = grad.double(), wanted_grad
        torch.testing.assert_close(
            got, wanted, rtol=2e-2, atol=0.02 * (wanted.abs().max().item() or 1)
        )
    else:
        largest = largest_term(case, want, upstream)
        assert_grad(grad, wanted_grad, case.storage.dtype, largest)


@pytest.mark.parametrize("backend", FAST)
@settings(PRODUCT, max_examples=60)
@given(case=cases(dtypes=(torch.bfloat16, torch.float16), views=("bsv", "sbv", "sliced", "offset")))
def test_gradient_is_the_fp32_gradient_rounded_once(backend, case):
    upstream = torch.rand(case.labels.numel()) * 3 - 1
    with using(backend) as name:
        losses, grad = run(case, name, upstream)
        losses32, grad32 = run(case, name, upstream, dtype=torch.float32)
    assert torch.equal(losses, losses32)
    assert torch.equal(grad, grad32.to(grad.dtype))


@pytest.mark.parametrize("backend", FAST)
@settings(PRODUCT, max_examples=60)
@given(case=cases(views=("bsv", "sbv", "sliced", "offset", "nv")))
def test_in_place_gradient_is_the_same(backend, case):
    with using(backend) as name:
        losses, grad = run(case, name)
        leaf = case.storage.clone().requires_grad_()
        memory = leaf * 1  # a non-leaf that owns its memory
        logits = case.logits(memory)
        loss = fsl.sft_loss(
            logits,
            case.labels,
            case.loss_mask,
            reduction="sum",
            backend=name,
            inplace_backward=True,
            **case.call_options(),
        )
        (grad_logits,) = torch.autograd.grad(loss, logits)
    assert torch.equal(case.logits(grad), grad_logits)
    assert grad_logits.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("v", [1000, 32000, 151936])
def test_mean_loss_within_1e_6_relative(backend, dtype, v):
    case = build("bsv", dtype, 2, 8, v, 3, "float", {})
    with using(backend) as name:
        loss = fsl.sft_loss(case.storage, case.labels, case.loss_mask, backend=name)
    want = expected(case).reduce("mean")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_their_gradients(backend, reduction):
    case = build("bsv", torch.float32, 2, 6, 1000, 1, "float", {})
    leaf = case.storage.clone().requires_grad_()
    want = expected(case)
    with using(backend) as name:
        out = fsl.sft_loss(leaf, case.labels, case.loss_mask, reduction=reduction, backend=name)
        (out * 2.5).sum().backward()
    wanted = want.reduce(reduction)
    assert out.shape == (case.labels.shape if reduction == "none" else ())
    torch.testing.assert_close(out.double().flatten(), wanted.flatten(), rtol=1e-6, atol=1e-6)
    factor = 2.5 / (want.weight.sum() if reduction == "mean" else 1)
    torch.testing.assert_close(
        leaf.grad.double().view(-1, 1000), want.grad * factor, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("v", VOCABULARIES)
def test_loss_does_not_depend_on_layout_strides_or_batch_order(backend, v):
    """The same logits in any memory layout give the same bits."""
    base = build("bsv", torch.bfloat16, 2, 3, v, 5, "float", {})
    b, s = base.labels.shape
    padded = torch.full((b, s + 1, v + 3), float("nan"), dtype=torch.bfloat16)
    padded[:, :s, :v] = base.storage
    with using(backend) as name:

        def losses(logits, labels=base.labels, mask=base.loss_mask, **options):
            return fsl.sft_loss(logits, labels, mask, reduction="none", backend=name, **options)

        reference = losses(base.storage)
        sbv = base.storage.transpose(0, 1).contiguous()
        assert torch.equal(losses(sbv, layout="sbv"), reference)
        assert torch.equal(losses(sbv.transpose(0, 1)), reference)
        assert torch.equal(losses(padded[:, :s, :v]), reference)
        flipped = losses(base.storage.flip(0), base.labels.flip(0), base.loss_mask.flip(0))
        assert torch.equal(flipped.flip(0), reference)


@pytest.mark.parametrize("tile", sampled([7, 64, 1000], [64]))
@settings(PRODUCT, max_examples=60)
@given(case=cases(vocabularies=(2, 33, 1000), views=("bsv", "sbv", "sliced")))
def test_eager_cut_into_small_tiles(tile, case):
    """Small tiles stand for a vocabulary of a million: rows span tiles, the first ones are -inf."""
    options, out = case.options, case.columns // 3
    options.update(vocab_size=None, label_smoothing=0.0)  # smoothing over -inf: an infinite loss
    case.logits(case.storage)[..., :out] = -float("inf")
    scored = case.labels != options["ignore_index"]
    case.labels = torch.where(scored, case.labels.clamp_min(out), case.labels)
    upstream = torch.rand(case.labels.numel()) * 3 - 1
    want = expected(case, upstream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_sft_loss.backends.eager.TILE", tile)
        losses, grad = run(case, "eager", upstream)
        metrics = fsl.token_metrics(
            case.logits(case.storage),
            case.labels,
            case.loss_mask,
            backend="eager",
            **case.call_options(),
        )
    assert_losses(losses, want)
    largest = largest_term(case, want, upstream)
    assert_grad(grad, storage_grad(case, want.grad), case.storage.dtype, largest)
    assert torch.equal(metrics.correct.flatten(), want.correct)
    torch.testing.assert_close(metrics.entropy.flatten().double(), want.entropy, rtol=0, atol=2e-5)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_a_targets_own_gradient_wherever_in_a_vector_it_lies(backend, dtype, inplace):
    """The target may be in the first vectors of a row or in the last vectors of a tile, after which
    lanes no longer synchronise."""
    v, places = 4096, 32
    labels = torch.cat([torch.arange(places), v - 1 - torch.arange(places)]).unsqueeze(0)
    logits = torch.randn(1, 2 * places, v).to(dtype)
    want = torch.softmax(logits.double(), -1)
    want.scatter_add_(-1, labels.unsqueeze(-1), torch.full_like(want[..., :1], -1.0))
    leaf = logits.clone().requires_grad_()
    with using(backend) as name:
        options = {"shift": False, "reduction": "sum", "inplace_backward": inplace}
        fsl.sft_loss(leaf * 1, labels, backend=name, **options).backward()
    assert_grad(leaf.grad, want, dtype, 1.0)

"""Bugs that other libraries shipped, in strides, sums and shapes; each test is named after one."""

import pytest
import torch
import torch.nn.functional as F
from cases import build, expected
from oracle import evaluate
from peer_problems import INF, NAN, grad_of, problem

import fused_sft_loss as fsl


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_scaled_after_rounding(backend, dtype):
    """Upstream gradient and weight are applied before the only rounding, powers of two or not."""
    logits, labels, mask = problem(dtype=dtype)
    upstream = torch.tensor(0.3)
    _, grad = grad_of(logits, labels, mask * 0.7, backend=backend, upstream=upstream)
    _, grad32 = grad_of(logits.float(), labels, mask * 0.7, backend=backend, upstream=upstream)
    assert torch.equal(grad, grad32.to(dtype))
    twice = (grad_of(logits, labels, mask * 0.7, backend=backend)[1].float() * 0.3).to(dtype)
    assert not torch.equal(grad, twice)  # two roundings differ: proves that the check can fail


def test_target_minus_one_formed_in_bf16(backend):
    """p - 1 at a target with p near 1: computed in bf16 it would be 0."""
    logits = torch.full((1, 1, 64), -8.0, dtype=torch.bfloat16)
    logits[0, 0, 3] = 4.0
    labels = torch.tensor([[3]])
    _, grad = grad_of(logits, labels, backend=backend, shift=False)
    want = torch.softmax(logits.double(), -1)
    want[0, 0, 3] = -(want[0, 0, torch.arange(64) != 3].sum())
    assert 0 < -want[0, 0, 3] < 2**-9
    torch.testing.assert_close(grad.double(), want, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("kind", ["sum", "expand", "transposed", "half"])
def test_stride_0_upstream_gradient(backend, kind):
    logits, labels, mask = problem()
    upstream = {
        "sum": torch.ones(()).expand(2, 5),
        "expand": torch.rand(5).expand(2, 5),
        "transposed": torch.rand(5, 2).t(),
        "half": torch.rand(2, 5).repeat_interleave(2, 1)[:, ::2],
    }[kind]
    _, grad = grad_of(logits, labels, mask, backend=backend, reduction="none", upstream=upstream)
    dense = upstream.contiguous().clone()
    _, wanted = grad_of(logits, labels, mask, backend=backend, reduction="none", upstream=dense)
    assert torch.equal(grad, wanted)


def test_transposed_or_sliced_logits(backend):
    logits, labels, mask = problem()
    loss, grad = grad_of(logits, labels, mask, backend=backend)
    storage = torch.full((2, 9, 1003), NAN)
    leaf = storage.requires_grad_()
    with torch.no_grad():
        leaf[:, 2:7, 1:1001] = logits
    sliced = leaf[:, 2:7, 1:1001]
    out = fsl.sft_loss(sliced, labels, mask, backend=backend)
    out.backward()
    assert torch.equal(out.detach(), loss) and torch.equal(leaf.grad[:, 2:7, 1:1001], grad)
    assert leaf.grad.count_nonzero() == grad.count_nonzero()  # nothing is written outside the slice


def test_non_unit_vocabulary_stride_is_an_error(backend):
    logits, labels, mask = problem()
    with pytest.raises(ValueError, match="vocabulary stride of 1.*contiguous"):
        fsl.sft_loss(logits.repeat_interleave(2, -1)[..., ::2], labels, mask, backend=backend)


def test_input_is_written_only_by_an_in_place_backward(backend):
    logits, labels, mask = problem()
    memory = logits.clone().requires_grad_() * 1
    before, version = memory.detach().clone(), memory._version
    loss = fsl.sft_loss(memory, labels, mask, backend=backend, inplace_backward=True)
    assert torch.equal(memory.detach(), before) and memory._version == version
    loss.backward(retain_graph=True)
    assert memory._version > version and not torch.equal(memory.detach(), before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_gradient_does_not_hide_from_other_users_of_the_logits(backend):
    logits, labels, mask = problem()
    memory = logits.clone().requires_grad_() * 1
    other = memory.square().sum()  # autograd saved the logits for this, too
    loss = fsl.sft_loss(memory, labels, mask, backend=backend, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_all_negative_and_far_apart_logits(backend):
    """The maximum may be negative, and far above the first columns."""
    logits = torch.full((1, 2, 9000), -300.0)
    logits[..., 4000] = -50.0
    logits[..., 8999] = -49.0
    labels = torch.tensor([[0, 8999]])
    loss, _ = grad_of(logits, labels, backend=backend)
    want = torch.log1p(torch.tensor(-1.0).exp().double())
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)


def test_softcap_brings_padding_back(backend):
    """Padding and -inf columns stay out of a softcapped softmax. Capped, -inf would become -cap."""
    logits, labels, mask = problem()
    labels = labels.clamp_max(799)
    options = {"backend": backend, "softcap": 2.0}
    loss, grad = grad_of(logits, labels, mask, vocab_size=800, **options)
    want = evaluate(logits[..., :800], labels, mask, softcap=2.0).reduce("mean")
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    assert (grad[..., 800:] == 0).all()
    masked_out = logits.clone()
    masked_out[..., 800:] = -INF
    loss, grad = grad_of(masked_out, labels, mask, **options)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    assert (grad[..., 800:] == 0).all()


@pytest.mark.parametrize("v", [1, 2, 31, 32, 33, 1000, 32000, 50257, 128256, 151936])
def test_phantom_columns(backend, v):
    """Memory behind a row's end is not part of the row."""
    storage = torch.full((1, 3, v + 64), 1e4)
    storage[..., :v] = torch.randn(1, 3, v)
    labels = torch.randint(0, v, (1, 3))
    loss, _ = grad_of(storage[..., :v], labels, backend=backend)
    want = F.cross_entropy(storage[0, :-1, :v].double(), labels[0, 1:])
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)


def test_padded_vocabulary_counted_in_the_softmax(backend):
    logits, labels, mask = problem()
    logits[..., 900:] = 50.0
    labels = labels.clamp_max(899)
    loss, grad = grad_of(logits, labels, mask, backend=backend, vocab_size=900)
    alone, _ = grad_of(logits[..., :900].contiguous(), labels, mask, backend=backend)
    torch.testing.assert_close(loss, alone, rtol=2e-7, atol=0)
    assert (grad[..., 900:] == 0).all()


def test_offsets_beyond_2_31_elements(backend):
    """Rows are 2^31 + 2^20 elements apart; the memory between them is never touched."""
    v, step = 1000, 2**31 + 2**20
    storage = torch.empty(step + v, dtype=torch.bfloat16)
    rows = storage.as_strided((2, 1, v), (step, v, 1))
    small = torch.randn(2, 1, v).bfloat16()
    rows.copy_(small)
    labels = torch.tensor([[3], [4]])
    want, want_grad = grad_of(small, labels, backend=backend, shift=False)
    leaf = rows.requires_grad_() * 1  # a contiguous copy
    assert leaf.stride(0) < step
    loss = fsl.sft_loss(rows, labels, backend=backend, shift=False)
    (grad,) = torch.autograd.grad(loss, rows)
    assert torch.equal(loss.detach(), want) and torch.equal(grad, want_grad)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8])
def test_misaligned_labels(backend, dtype):
    """labels[1:] starts one element into an allocation; a strided column starts anywhere."""
    logits, labels, _ = problem(v=200)
    want, _ = grad_of(logits, labels, backend=backend)
    flat = torch.cat([torch.zeros(1, dtype=torch.int64), labels.flatten()]).to(dtype)
    got, _ = grad_of(logits, flat[1:].view(2, 5), backend=backend)
    assert torch.equal(got, want)
    strided = torch.stack([labels, labels * 0], -1).to(dtype)[..., 0]
    got, _ = grad_of(logits, strided, backend=backend)
    assert torch.equal(got, want)


def test_label_smoothing_is_torchs_over_the_vocabulary(backend):
    logits, labels, _ = problem()
    loss, _ = grad_of(logits, labels, backend=backend, label_smoothing=0.1)
    want = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
    )
    torch.testing.assert_close(loss, want)


def test_fp16_gradient_overflows_to_infinity_like_a_cast(backend):
    logits, labels, _ = problem(dtype=torch.float16)
    upstream = torch.tensor(2.0**20)
    _, grad = grad_of(logits, labels, backend=backend, upstream=upstream)
    _, grad32 = grad_of(logits.float(), labels, backend=backend, upstream=upstream)
    assert torch.equal(grad, grad32.half()) and grad.isinf().any()


def test_oracle_agrees_with_torch():
    """Checks the oracle itself against PyTorch's float64 cross-entropy."""
    case = build("bsv", torch.float32, 2, 6, 100, 0, "none", {"label_smoothing": 0.2})
    want = F.cross_entropy(
        case.storage[:, :-1].flatten(0, 1).double(),
        case.labels[:, 1:].flatten(),
        label_smoothing=0.2,
    )
    torch.testing.assert_close(expected(case).reduce("mean"), want)


@pytest.mark.parametrize("one_read", [False, True])
def test_the_gradients_own_gradient_is_refused_not_zero(one_read):
    logits = torch.randn(1, 4, 50, requires_grad=True)
    options = {"grad_in_forward": one_read, "backend": "cpu" if one_read else "eager"}
    loss = fsl.sft_loss(logits, torch.randint(0, 50, (1, 4)), **options)
    (grad,) = torch.autograd.grad(loss.square(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="expected one derivative"):
        grad.sum().backward()

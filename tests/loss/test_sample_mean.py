"""reduction="sample_mean": every sample weighs alike, however long it is."""

import pytest
import torch
import torch.distributed as dist
from backends import BUILT, ON_CPU, using
from cases import build, cases, expected, largest_term, storage_grad
from closeness import PRODUCT, assert_grad
from hypothesis import given, settings
from samples import row_factors, sample_of
from tiers import sampled

import fused_sft_loss as fsl
from bench.ranks import run_ranks
from fused_sft_loss import samples

FAST = sampled(ON_CPU, [name for name in ON_CPU if name != "hip-simt"])
MEAN = {"reduction": "sample_mean"}
#: A long document, an empty one, a short one, positions outside all, and a legacy tail.
PACKED = torch.tensor([0, 7, 7, 9, 14, -1, -1])


def wanted(case):
    """The loss, and the gradient of each row's losses that the oracle multiplies by, in float64."""
    want = expected(case)
    factors = row_factors(want.weight, sample_of(case.labels, case.options.get("cu_seqlens")))
    return (want.losses * factors).sum(), factors


@pytest.mark.parametrize("backend", FAST)
@settings(PRODUCT, max_examples=25)
@given(case=cases(views=("bsv", "sbv", "sliced", "nv")))
def test_loss_and_gradient_over_the_option_product(backend, case):
    loss, factors = wanted(case)
    want = expected(case, 1.5 * factors)
    leaf = case.storage.clone().requires_grad_()
    with using(backend) as name:
        got = fsl.sft_loss(
            case.logits(leaf), case.labels, case.loss_mask, backend=name, **MEAN,
            **case.call_options(),
        )  # fmt: skip
        (got * 1.5).backward()
    size = 1 + loss.abs() + want.lse.abs().max()
    torch.testing.assert_close(got.detach().double() / size, loss / size, rtol=0, atol=1e-6)
    assert_grad(
        leaf.grad,
        storage_grad(case, want.grad),
        case.storage.dtype,
        largest_term(case, want, 1.5 * factors),
    )


def packed_case(dtype=torch.float32, mask="float", **options):
    return build("bsv", dtype, 2, 8, 1000, 4, mask, options)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("bounds", [PACKED, PACKED.int(), torch.tensor([3, 5, 16])], ids=str)
def test_documents_of_cu_seqlens_are_the_samples(backend, bounds):
    case = packed_case(cu_seqlens=bounds)
    end = [*bounds.tolist(), -1].index(-1)
    loss = wanted(packed_case(cu_seqlens=bounds[:end]))[0]
    with using(backend) as name:
        got = fsl.sft_loss(
            case.storage, case.labels, case.loss_mask, cu_seqlens=bounds, backend=name, **MEAN
        )
    torch.testing.assert_close(got.double(), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BUILT)
def test_shifted_labels_take_the_documents_too(backend):
    """With shift=False the boundaries only say which tokens form a sample."""
    case = packed_case()
    bounds = PACKED[:5]
    labels, mask = fsl.shift_targets(case.labels, case.loss_mask, bounds)
    options = {"cu_seqlens": bounds, "backend": backend}
    want = fsl.sft_loss(case.storage, case.labels, case.loss_mask, **MEAN, **options)
    mask[-1, -1], labels[-1, -1] = 1.0, 10**6  # outside all documents
    got = fsl.sft_loss(case.storage, labels, mask, shift=False, **MEAN, **options)
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="expected no cu_seqlens with shift=False"):
        fsl.sft_loss(case.storage, labels, mask, shift=False, **options)


SCHEDULES = [(name, {"inplace_backward": inplace}) for name in BUILT for inplace in (False, True)]
SCHEDULES += [(name, {"grad_in_forward": True}) for name in BUILT if name != "eager"]


@pytest.mark.parametrize(("backend", "options"), SCHEDULES)
def test_trap_empty_samples_are_left_out(backend, options):
    """Neither a division by 0, as verl once did, nor a sample with loss 0, as slime has it."""
    case = packed_case()
    case.loss_mask[1] = 0
    leaf = case.storage.clone().requires_grad_()
    got = fsl.sft_loss(leaf * 1, case.labels, case.loss_mask, backend=backend, **MEAN, **options)
    got.backward()
    alone = case.storage[:1].clone().requires_grad_()
    want = fsl.sft_loss(alone, case.labels[:1], case.loss_mask[:1], backend=backend)
    want.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(leaf.grad[:1], alone.grad)
    assert not leaf.grad[1].any()


@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("bounds", [None, PACKED], ids=str)
def test_trap_nothing_scored_is_zero_with_a_graph(backend, bounds):
    case = packed_case()
    leaf = case.storage.clone().requires_grad_()
    got = fsl.sft_loss(
        leaf, case.labels, case.loss_mask * 0, cu_seqlens=bounds, backend=backend, **MEAN
    )
    got.backward()
    assert got == 0 and torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("backend", [name for name in ON_CPU if "eager" not in name])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_in_forward_is_that_of_backward(backend, inplace, dtype):
    case = packed_case(dtype)
    found = []
    for expects in (False, 0.5):
        leaf = case.storage.clone().requires_grad_()
        with using(backend) as name:
            loss = fsl.sft_loss(
                leaf * 1, case.labels, case.loss_mask, cu_seqlens=PACKED, backend=name,
                grad_in_forward=expects, inplace_backward=inplace, **MEAN,
            )  # fmt: skip
            loss.backward(torch.tensor(0.5))
        found.append((loss.detach(), leaf.grad))
    (loss, grad), (loss_in_forward, grad_in_forward) = found
    torch.testing.assert_close(loss_in_forward, loss, rtol=1e-6, atol=0)
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(grad_in_forward, grad, rtol=rtol, atol=1e-8)
    assert grad.any()


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Micro-batches with as many samples each: their mean, as every trainer averages them."""
    case = build("bsv", torch.float32, 4, 8, 1000, 2, "float", {})
    whole = case.storage.clone().requires_grad_()
    fsl.sft_loss(whole, case.labels, case.loss_mask, **MEAN).backward()
    parts = case.storage.clone().requires_grad_()
    for rows in (slice(0, 2), slice(2, 4)):
        (fsl.sft_loss(parts[rows], case.labels[rows], case.loss_mask[rows], **MEAN) / 2).backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("bounds", [None, PACKED], ids=str)
def test_compiled_step_equals_the_eager_one(backend, bounds):
    torch._dynamo.reset()
    case = packed_case()

    def step(x, labels, mask):
        return fsl.sft_loss(x * 1.5, labels, mask, cu_seqlens=bounds, backend=backend, **MEAN)

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = case.storage.clone().requires_grad_()
        loss = run(leaf, case.labels, case.loss_mask)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert all(map(torch.equal, *results))


def of_two_ranks():
    """Loss and gradient of this rank's half of the vocabulary, and the error of other samples."""
    rank = dist.get_rank()
    case = packed_case()
    part = case.storage.chunk(2, -1)[rank].clone().requires_grad_()
    options = {"tp_group": dist.group.WORLD, "vocab_size": 1000, **MEAN}
    loss = fsl.sft_loss(part, case.labels, case.loss_mask, cu_seqlens=PACKED, **options)
    loss.backward()
    with pytest.raises(ValueError) as raised:  # the targets are equal, but not the samples
        fsl.sft_loss(
            part, case.labels, case.loss_mask, shift=False, **options,
            cu_seqlens=torch.tensor([0, 8 + 4 * rank, 16]),
        )  # fmt: skip
    return loss.detach(), part.grad, str(raised.value)


def test_sharded_vocabulary_gives_the_unsharded_result():
    ranks = run_ranks(2, of_two_ranks)
    case = packed_case()
    leaf = case.storage.clone().requires_grad_()
    want = fsl.sft_loss(leaf, case.labels, case.loss_mask, cu_seqlens=PACKED, **MEAN)
    want.backward()
    assert torch.equal(ranks[0][0], ranks[1][0])
    torch.testing.assert_close(ranks[0][0], want.detach(), rtol=1e-6, atol=0)
    grad = torch.cat([part for _, part, _ in ranks], -1)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-5, atol=1e-8)
    assert all("cu_seqlens on ranks" in message for *_, message in ranks)


def test_module_and_names():
    case = packed_case()
    module = fsl.SFTLoss(cu_seqlens=PACKED, shift=False, **MEAN)
    got = module(case.storage, case.labels, case.loss_mask, shift=True)
    want = fsl.sft_loss(case.storage, case.labels, case.loss_mask, cu_seqlens=PACKED, **MEAN)
    assert torch.equal(got, want) and "reduction='sample_mean'" in repr(module)
    with pytest.raises(ValueError, match="sample_mean.*got 'seq-mean-token-mean'"):
        fsl.sft_loss(case.storage, case.labels, reduction="seq-mean-token-mean")


def test_nan_weight_of_an_unchecked_mask_reaches_the_loss():
    """An accelerator does not check weights. A NaN must not become a sample that is left out."""
    weight = torch.tensor([[1.0, torch.nan], [1.0, 3.0]])
    for bounds in (None, torch.tensor([0, 2, 4])):
        sums = samples.totals(weight, bounds)
        shares = samples.shares(weight, sums, bounds)
        assert shares[0].isnan().all() and shares[1].tolist() == [0.25, 0.75]


def test_boundaries_beyond_the_positions_are_not_read():
    """An accelerator does not check boundaries. The segment sums must stay inside the weights."""
    sums = samples.totals(torch.ones(2, 3), torch.tensor([0, 4, 10**9]))
    assert sums.tolist() == [4.0, 2.0]


def test_long_samples_are_summed_exactly():
    """A sum in fp32 loses tokens from 2^24 on; a sum of fractions loses digits much earlier."""
    weight = torch.full((1, 1 << 20), 0.1)
    for bounds in (None, torch.tensor([0, 1 << 20])):
        want = weight.double().sum()
        assert abs(samples.totals(weight, bounds) - want) <= 1e-12 * want

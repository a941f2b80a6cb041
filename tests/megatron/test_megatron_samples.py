"""returns="per_sample": every sample of the global batch weighs alike, however long it is."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from samples import row_factors, sample_of
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.megatron_cpu import init, run_ranks
from fused_sft_loss import shift_targets
from fused_sft_loss.megatron import fused_cross_entropy, make_forward_step, sft_loss_func

PER_SAMPLE = {"returns": "per_sample"}
#: Four documents of uneven length over 2 x 8 positions; the third is not scored.
BOUNDS = torch.tensor([0, 5, 8, 10, 16])
CONFIG = SimpleNamespace(calculate_per_token_loss=True)


def packed(bounds, padded=None):
    return SimpleNamespace(cu_seqlens_q=bounds, cu_seqlens_q_padded=padded)


def batch(seed=3):
    """Logits [2, 8, 11] with a graph, labels, fractional weights [2, 8]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 8, 11, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (2, 8), generator=generator)
    mask = torch.rand(2, 8, generator=generator) * (torch.rand(2, 8, generator=generator) > 0.2)
    mask[1, 0:2] = 0
    return logits, labels, mask


def wanted(logits, labels, mask, bounds=None):
    """(sum of the samples' means, number of samples, gradient of the sum), in float64."""
    logits = logits.detach().double().requires_grad_()
    labels, mask = shift_targets(labels, mask, bounds)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    weight = torch.where(labels == -100, 0, mask).double().flatten()
    factors = row_factors(weight, sample_of(labels, bounds))
    count = len({s for s, f in zip(sample_of(labels, bounds), factors, strict=True) if f})
    total = (losses * weight * factors).sum() * count
    return total.detach(), count, torch.autograd.grad(total, logits)[0]


def assert_is(result, logits, want):
    (loss, count, report), (total, samples, grad) = result, want
    assert count.dtype == torch.int32 and count.shape == () and count == samples
    torch.testing.assert_close(loss.detach().double(), total, rtol=1e-6, atol=0)
    pair = torch.stack([loss.detach(), torch.tensor(float(samples))])
    assert torch.equal(report["lm loss"], pair)
    loss.backward()
    torch.testing.assert_close(logits.grad.double(), grad, rtol=1e-5, atol=1e-7)


def documents():
    """name: (options of sft_loss_func, the same boundaries for the oracle)."""
    restart = torch.cat([torch.arange(n) for n in BOUNDS.diff().tolist()]).view(2, 8)
    padding = packed(torch.tensor([0, 4, 7, 12]), torch.tensor([0, 5, 8, 16]))
    return {
        "rows": ({}, None),
        "cu_seqlens": ({"cu_seqlens": BOUNDS}, BOUNDS),
        "[1, k+1] with a tail": (
            {"cu_seqlens": F.pad(BOUNDS, (0, 2), value=-1).unsqueeze(0)},
            BOUNDS,
        ),
        "packed_seq_params": ({"packed_seq_params": packed(BOUNDS)}, BOUNDS),
        "padded": ({"packed_seq_params": padding}, torch.tensor([0, 4, 5, 8, 8, 13, 16])),
        "position_ids": ({"position_ids": restart}, BOUNDS),
    }


@pytest.mark.parametrize("name", documents())
def test_samples_are_documents_or_rows(name):
    options, bounds = documents()[name]
    logits, labels, mask = batch()
    outside = mask.clone()
    if name == "padded":  # positions between documents are not scored
        outside.view(-1)[[4, 13, 14, 15]] = 0
    want = wanted(logits, labels, outside, bounds)
    assert_is(sft_loss_func(labels, mask, logits, **PER_SAMPLE, **options), logits, want)


@pytest.mark.parametrize("name", ["cu_seqlens", "packed_seq_params", "position_ids"])
def test_shifted_labels_take_the_documents_too(name):
    options, bounds = documents()[name]
    logits, labels, mask = batch()
    want = wanted(logits, labels, mask, bounds)
    labels, mask = shift_targets(labels, mask, bounds)
    result = sft_loss_func(labels, mask, logits, shift=False, **PER_SAMPLE, **options)
    assert_is(result, logits, want)


def test_trap_nothing_scored_is_zero_with_a_graph():
    logits, labels, mask = batch()
    loss, count, report = sft_loss_func(labels, mask * 0, logits, **PER_SAMPLE)
    assert loss == 0 and count == 0 and loss.requires_grad and not report["lm loss"].any()
    (loss / count).backward()  # megatron-core 0.14 divides unclamped
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_figures_count_tokens():
    logits, labels, mask = batch()
    report = ("lm loss", "accuracy", "nll")
    plain = sft_loss_func(labels, mask, logits, report=report)[-1]
    alike = sft_loss_func(labels, mask, logits, report=report, **PER_SAMPLE)[-1]
    for name in ("accuracy", "nll"):
        torch.testing.assert_close(alike[name], plain[name])
    assert not torch.equal(alike["lm loss"], plain["lm loss"])


def test_metrics_are_not_weighed():
    logits, labels, mask = batch()
    options = {"non_loss_data": True, "cu_seqlens": BOUNDS}
    plain = sft_loss_func(labels, mask, logits, **options)
    alike = sft_loss_func(labels, mask, logits, **PER_SAMPLE, **options)
    assert all(torch.equal(plain[name], alike[name]) for name in plain)


def test_no_value_is_read_by_the_host():
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits, labels = torch.empty(2, 8, 11, requires_grad=True), torch.zeros(2, 8).long()
        bounds = torch.empty(5, dtype=torch.int64)
        for options in ({}, {"cu_seqlens": bounds, "shift": False}):
            loss, count, _ = sft_loss_func(
                labels, torch.ones(2, 8), logits, **PER_SAMPLE, **options
            )
            loss.backward()
            assert count.dtype == torch.int32 and logits.grad.shape == logits.shape


class Returning(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, tokens, position_ids, attention_mask, **_):
        return self.logits


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("name", documents())
def test_forward_step_hands_the_documents_to_the_loss(name, shift):
    options, bounds = documents()[name]
    logits, labels, mask = batch()
    if name == "padded":
        mask.view(-1)[[4, 13, 14, 15]] = 0
    want = wanted(logits, labels, mask, bounds)
    given = dict(zip(("labels", "loss_mask"), shift_targets(labels, mask, bounds), strict=True))
    parts = {"tokens": labels, "attention_mask": None, "position_ids": None, "loss_mask": mask}
    parts |= options if shift else {**given, **options}
    restart = {"position_ids": "restart"} if name == "position_ids" else {}
    step = make_forward_step(next, shift=shift, **PER_SAMPLE, **restart)
    output, loss_func = step(iter([parts]), Returning(logits))
    assert_is(loss_func(output), logits, want)


@pytest.mark.parametrize(
    ("mask", "options", "kind", "says"),
    [
        (torch.full((2, 8), -1.0), {}, ValueError, "expected loss_mask >= 0"),
        (torch.ones(1, 8), {}, ValueError, "loss_mask of the labels' shape"),
        (None, {"cu_seqlens": torch.tensor([0, 99])}, ValueError, "cu_seqlens increasing within"),
        (None, {"num_tokens": torch.tensor(4)}, ValueError, "num_tokens: expected None with"),
        (None, {"reduction": "sample_mean"}, TypeError, "'per_sample' is \"sample_mean\""),
    ],
)
def test_errors(mask, options, kind, says):
    logits, labels, _ = batch()
    with pytest.raises(kind, match=says):
        sft_loss_func(labels, mask, logits, **PER_SAMPLE, **options)


@pytest.mark.parametrize("name", ["returns", "reduction"])
def test_a_trainers_own_normaliser_is_refused(name):
    error = pytest.raises(TypeError, match="divides them by a number of tokens.*per_sample")
    with error, fused_cross_entropy(None, **{name: "per_sample"}):
        pass


def of_context_parallel_rank():
    """Documents sliced one by one, as for packed attention: (result, gradient, errors)."""
    init(cp=2)
    rank = dist.get_rank()
    logits, labels, mask = batch()
    labels, mask = shift_targets(labels.view(1, -1), mask.view(1, -1), EVEN)
    mine = parts_of(EVEN, rank)
    local = logits.detach().view(1, 16, 11)[:, mine].requires_grad_()
    options = {"shift": False, "config": CONFIG, **PER_SAMPLE}
    targets = labels[:, mine], mask[:, mine], local
    loss, count, report = sft_loss_func(*targets, cu_seqlens=EVEN // 2, **options)
    loss.backward()
    errors = []
    for wrong in (
        {"config": None},
        {"packed_seq_params": packed(EVEN)},
        {"position_ids": torch.zeros(1, 8)},
    ):
        with pytest.raises(ValueError) as raised:
            sft_loss_func(*targets, **{**options, **wrong})
        errors.append(str(raised.value))
    return loss.detach(), count, report["lm loss"], local.grad, errors


#: Documents whose lengths are multiples of 2 * cp.
EVEN = torch.tensor([0, 4, 12, 16])


def parts_of(bounds, rank):
    """The positions of one of two context-parallel ranks: the outer or inner quarters of each
    document."""
    positions = []
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        quarters = torch.arange(begin, end).view(4, -1)
        positions.append(quarters[[0, 3] if rank == 0 else [1, 2]].flatten())
    return torch.cat(positions)


def test_trap_a_sample_split_over_context_parallel_ranks_counts_once():
    ranks = run_ranks(2, of_context_parallel_rank)
    logits, labels, mask = batch()
    want = wanted(logits.view(1, 16, 11), labels.view(1, -1), mask.view(1, -1), EVEN)
    total, samples, grad = want
    losses, counts, reports, grads, errors = zip(*ranks, strict=True)
    assert [int(count) for count in counts] == [samples, 0]
    torch.testing.assert_close(sum(losses).double(), total, rtol=1e-6, atol=0)
    assert torch.equal(sum(reports), torch.stack([sum(losses), torch.tensor(float(samples))]))
    for rank, part in enumerate(grads):
        right = grad[:, parts_of(EVEN, rank)]
        torch.testing.assert_close(part.double(), right, rtol=1e-5, atol=1e-7)
    for config, of_model, positions in errors:
        assert "expected calculate_per_token_loss=True" in config
        assert "with packed_seq_params under context parallelism of size 2" in of_model
        assert "with position_ids under context parallelism of size 2" in positions

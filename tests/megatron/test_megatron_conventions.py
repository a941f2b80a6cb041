"""Megatron's schedules divide, add and check a loss_func's tuple; ours must survive that."""

import inspect
import subprocess
import sys

import megatron_runs as runs
import pytest
import torch
import torch.nn.functional as F
from megatron_runs import Case
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.megatron_cpu import build_model, config, init, run_ranks
from fused_sft_loss.megatron import make_forward_step, sft_loss_func, versions

RETURNS = ("per_token", "mean")


def micro_batch(mask=((0, 1, 0, 1, 1), (1, 0, 0.25, 0, 0))):
    """Logits [2, 5, 11] fp32, labels [2, 5], mask [2, 5]; by default 4 targets, weights 3.25."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, 11, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (2, 5), generator=generator)
    return logits, labels, torch.tensor(mask, dtype=torch.float32)


def weighted_sum(logits, labels, mask):
    """sum(w * loss) in float64 and its gradient, straight from PyTorch."""
    logits = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    total = (losses * mask[:, 1:]).sum()
    return total.detach(), torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("returns", RETURNS)
def test_trap_loss_aliases_the_report(returns):
    """forward_step_calc_loss divides the loss in place, then backward runs from it."""
    logits, labels, mask = micro_batch()
    loss, *num_tokens, report = sft_loss_func(labels, mask, logits, returns=returns)
    others = [*num_tokens, report["lm loss"]]
    before = [other.clone() for other in others]
    assert loss._base is None, "a view: dividing it in place would change another tensor"
    loss /= 8
    assert all(map(torch.equal, others, before))
    loss.backward()
    weight = 1 if returns == "per_token" else mask[:, 1:].sum()
    wanted = weighted_sum(logits, labels, mask)[1] / weight / 8
    torch.testing.assert_close(logits.grad.double(), wanted, rtol=1e-5, atol=1e-7)


def test_per_token_is_a_sum_a_count_and_a_report_of_both():
    logits, labels, mask = micro_batch()
    loss, num_tokens, report = sft_loss_func(labels, mask, logits)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert (num_tokens.dtype, num_tokens.shape) == (torch.int32, ())
    assert num_tokens == 4, "targets with w != 0 are counted; their weights add up to 3.25"
    total = torch.zeros([], dtype=torch.int) + num_tokens  # the schedule's total_num_tokens
    total += num_tokens
    assert set(report) == {"lm loss"} and not report["lm loss"].requires_grad
    wanted = torch.stack([weighted_sum(logits, labels, mask)[0], torch.tensor(4.0)])
    torch.testing.assert_close(report["lm loss"], wanted.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.detach(), wanted[0].float(), rtol=1e-6, atol=0)


def test_mean_divides_by_the_weights():
    logits, labels, mask = micro_batch()
    loss, report = sft_loss_func(labels, mask, logits, returns="mean")
    wanted = (weighted_sum(logits, labels, mask)[0] / 3.25).float()
    assert loss.shape == report["lm loss"].shape == () and not report["lm loss"].requires_grad
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(report["lm loss"], wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("returns", RETURNS)
def test_trap_all_masked_micro_batch_is_zero_with_a_graph(returns):
    """backward_step skips a loss that requires no gradient, and a pipeline peer waits for ever."""
    logits, labels, mask = micro_batch(mask=[[0.0] * 5] * 2)
    loss, *_, report = sft_loss_func(labels, mask, logits, returns=returns)
    assert loss == 0 and loss.requires_grad and (report["lm loss"] == 0).all()
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_trap_all_masked_micro_batch_divided_by_its_count():
    """megatron-core 0.14 divides by num_tokens unclamped: upstream is inf, the gradient stays 0."""
    logits, labels, mask = micro_batch(mask=[[0.0] * 5] * 2)
    loss, num_tokens, _ = sft_loss_func(labels, mask, logits)
    loss /= num_tokens
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("returns", RETURNS)
def test_nan_in_a_scored_row_reaches_loss_and_report(returns):
    """Megatron's NaN checks read loss and report; a NaN at a masked position must reach neither."""
    for position, seen in ((0, True), (1, False)):  # labels 1 and 2 of the first sequence
        logits, labels, mask = micro_batch()
        with torch.no_grad():
            logits[0, position] = float("nan")
        loss, *_, report = sft_loss_func(labels, mask, logits, returns=returns)
        assert loss.isnan() == seen and report["lm loss"].isnan().any() == seen


def one_micro_batch_each(returns):
    """On every rank: (loss, logged report) of a micro-batch whose mask depends on the rank."""
    rank = init().get_data_parallel_rank()
    logits, labels, mask = micro_batch([[0.0] * 5, [1.0] * 5] if rank else [[0, 0.5, 0, 0, 0]] * 2)
    loss, *_, report = sft_loss_func(labels, mask, logits, returns=returns)
    return float(weighted_sum(logits, labels, mask)[0]), float(runs.reduced_report([report]))


@pytest.mark.parametrize(("returns", "divisor"), [("per_token", 6), ("mean", 5)])
def test_trap_mean_of_means_over_data_parallelism(returns, divisor):
    """Two ranks score 2 tokens of weight 0.5 and 4 of weight 1: 6 tokens, weights 5."""
    (sum0, logged0), (sum1, logged1) = run_ranks(2, one_micro_batch_each, returns)
    assert logged0 == logged1 == pytest.approx((sum0 + sum1) / divisor, rel=1e-6)


def last_rank_alone():
    if init().get_data_parallel_rank() == 1:
        logits, labels, mask = micro_batch()
        return sft_loss_func(labels, mask, logits, non_loss_data=True)


def test_non_loss_data_needs_no_other_data_parallel_rank():
    """Megatron-LM's evaluate() collects the report on the last rank of the job only."""
    nothing, metrics = run_ranks(2, last_rank_alone, timeout=30)
    assert nothing is None and metrics["loss"].shape == (2, 5)


@pytest.mark.parametrize("step", ["make", "own"])
def test_non_loss_data_through_the_schedule(step):
    """collect_non_loss_data=True on vocab-sharded logits: every micro-batch's metrics, detached."""
    unsharded = run_ranks(1, runs.reference)[0]
    case = Case(forward_only=True, non_loss=True, step=step)
    for (result,) in run_ranks(2, runs.train, unsharded["weights"], [case], tp=2):
        batches = zip(result["collected"], runs.micro_batches(), unsharded["parts"], strict=False)
        for metrics, batch, part in batches:
            assert not any(value.requires_grad for value in metrics.values())
            logits, labels = part["logits"][:, :-1], batch["tokens"][:, 1:]
            mask = batch["loss_mask"][:, 1:]
            losses = F.cross_entropy(logits.mT, labels, reduction="none")
            close = {"rtol": 1e-5, "atol": 1e-6}
            losses = torch.where(mask != 0, losses, 0.0)
            torch.testing.assert_close(metrics["loss"][:, :-1], losses, **close)
            assert torch.equal(metrics["loss"][:, -1], torch.zeros(runs.BATCH))
            correct = metrics["correct"][:, :-1].bool() & (mask != 0)
            assert torch.equal(correct, (logits.argmax(-1) == labels) & (mask != 0))


def logits_dtype(dtype, returns):
    """(the logits kept their dtype if the model allows it, the loss) of a wrapped model."""
    init()
    model = build_model(config(dtype, **runs.SHAPE), runs.VOCAB, runs.SEQ)
    step = make_forward_step(next, returns=returns)
    logits, loss_func = step(iter(runs.micro_batches()), model)
    loss, *_ = loss_func(logits)
    loss.backward()
    kept = dtype if versions.accepts(model, "fp32_output") else torch.float32
    return logits.dtype == kept, float(loss), next(model.parameters()).grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_make_forward_step_makes_no_fp32_copy_of_the_logits(dtype):
    """Float16Module casts to fp32 unless it gets fp32_output=False, which it takes from 0.15 on. A
    bare GPTModel does not take it."""
    as_expected, loss, trained = run_ranks(1, logits_dtype, dtype, "mean")[0]
    assert as_expected and trained and 3 < loss < 6


class Returning(torch.nn.Module):
    """A model whose logits are known."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, tokens, position_ids, attention_mask):
        return self.logits


def test_forward_step_hands_the_whole_batch_to_the_loss():
    """Labels, mask and document boundaries all reach the loss: without one, it changes."""
    logits, labels, mask = micro_batch()
    batch = {"tokens": labels.flip(0), "position_ids": None, "attention_mask": None}
    batch |= {"labels": labels, "loss_mask": mask, "cu_seqlens": torch.tensor([0, 3, 10])}
    output, loss_func = make_forward_step(next)(iter([batch]), Returning(logits))
    first_of_a_document = torch.ones(2, 5)
    first_of_a_document[0, 3] = 0
    wanted = sft_loss_func(labels, mask * first_of_a_document, logits)
    assert loss_func(output)[1] == wanted[1] == 3
    assert torch.equal(loss_func(output)[0], wanted[0])


@pytest.mark.parametrize(
    ("before", "after", "keywords"),
    [
        ((), (False,), {}),
        ((), (), {"return_schedule_plan": False}),
        (("state",), (), {}),
        (("state",), (False,), {}),
        (("state",), (), {"return_schedule_plan": False}),
    ],
)
def test_trap_a_trainer_passes_more_than_iterator_and_model(before, after, keywords):
    """Megatron-LM and Primus pass return_schedule_plan, Megatron-Bridge a state before the rest."""
    logits, labels, mask = micro_batch()
    batch = {"tokens": labels, "position_ids": None, "attention_mask": None, "loss_mask": mask}
    arguments = (*before, iter([batch]), Returning(logits), *after)
    output, loss_func = make_forward_step(next)(*arguments, **keywords)
    assert torch.equal(loss_func(output)[0], sft_loss_func(labels, mask, logits)[0])


def test_a_trainer_that_reads_signatures_passes_no_state():
    """Megatron-Bridge passes it to a step with a parameter `state` or of type GlobalState, and once
    counted parameters: two are (data_iterator, model)."""
    parameters = inspect.signature(make_forward_step(next)).parameters
    assert list(parameters) == ["arguments", "return_schedule_plan"]


@pytest.mark.parametrize("returns", RETURNS)
def test_no_value_is_read_by_the_host(returns):
    """Fake tensors have no values: an .item() or a Python branch on one raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits, labels = torch.empty(2, 5, 11, requires_grad=True), torch.zeros(2, 5).long()
        loss, *_, report = sft_loss_func(labels, torch.ones(2, 5), logits, returns=returns)
        loss.backward()
        assert logits.grad.shape == logits.shape
        assert report["lm loss"].numel() == (2 if returns == "per_token" else 1)


def test_importing_the_package_imports_no_megatron():
    code = (
        "import sys, fused_sft_loss.megatron; print(*(m for m in sys.modules if 'megatron' in m))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = done.stdout.split()
    assert imported and all(name.startswith("fused_sft_loss.megatron") for name in imported)

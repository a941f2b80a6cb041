"""Reports besides the loss, Megatron's own checks of the loss, and the token count."""

import sys
from types import SimpleNamespace

import megatron_runs as runs
import pytest
import torch
from megatron_runs import Case

import fused_sft_loss as fsl
from bench.megatron_cpu import init, run_ranks
from fused_sft_loss.megatron import sft_loss_func

ALL = ("lm loss", "accuracy", "entropy", "nll", "perplexity")


def batch(seed=3):
    """Logits [2, 6, 11] with a graph, labels, mask: the label is often the likeliest token."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 11, (2, 6), generator=generator)
    logits = torch.randn(2, 6, 11, generator=generator)
    logits[:, :-1] += 3 * torch.nn.functional.one_hot(labels[:, 1:], 11)
    mask = (torch.rand(2, 6, generator=generator) > 0.4).float()
    mask[0, 1:3] = torch.tensor([0.5, 0.25])
    return logits.requires_grad_(), labels, mask


def wanted(logits, labels, mask):
    """name -> (sum over scored tokens, their number), computed by PyTorch in float64."""
    log_p = logits.detach().double()[:, :-1].log_softmax(-1)
    label, weight = labels[:, 1:], mask[:, 1:].double()
    log_prob, scored = log_p.gather(-1, label.unsqueeze(-1)).squeeze(-1), weight != 0
    sums = {
        "lm loss": -(weight * log_prob).sum(),
        "accuracy": (log_p.argmax(-1) == label)[scored].sum(),
        "entropy": -(log_p.exp() * log_p).sum(-1)[scored].sum(),
        "nll": -log_prob[scored].sum(),
        "perplexity": (-log_prob[scored]).exp().sum(),
    }
    return {name: (float(value), int(scored.sum())) for name, value in sums.items()}


@pytest.mark.parametrize("returns", ["per_token", "mean"])
def test_figures_are_sums_and_counts_of_scored_tokens(returns):
    logits, labels, mask = batch()
    options = {"returns": returns, "report": ALL}
    loss, *_, report = sft_loss_func(labels, mask, logits, **options)
    plain = sft_loss_func(labels, mask, logits, returns=returns)
    assert list(report) == list(ALL) and list(plain[-1]) == ["lm loss"]
    assert torch.equal(loss, plain[0]), "figures beside the loss do not change it"
    loss.backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.any()
    for name, (total, count) in wanted(logits, labels, mask).items():
        got = report[name]
        assert got.dtype == torch.float32 and not got.requires_grad
        if returns == "per_token":
            torch.testing.assert_close(got, torch.tensor([total, float(count)]))
        else:
            by = float(mask[:, 1:].sum()) if name == "lm loss" else count
            torch.testing.assert_close(got, torch.tensor(total / by, dtype=torch.float32))


def test_figures_ignore_smoothing_and_z_loss():
    logits, labels, mask = batch()
    options = {"label_smoothing": 0.2, "z_loss": 0.1, "report": ("nll", "lm loss")}
    report = sft_loss_func(labels, mask, logits, **options)[-1]
    assert list(report) == ["nll", "lm loss"]
    assert float(report["nll"][0]) == pytest.approx(wanted(logits, labels, mask)["nll"][0])
    assert report["lm loss"][0] > report["nll"][0]


@pytest.mark.parametrize("returns", ["per_token", "mean"])
def test_nothing_scored_reports_zero(returns):
    logits, labels, mask = batch()
    report = sft_loss_func(labels, mask * 0, logits, returns=returns, report=ALL)[-1]
    assert all((value == 0).all() for value in report.values())


@pytest.mark.parametrize("step", ["make", "in_place", "head", "linear"])
def test_figures_through_the_schedule_on_shards(step):
    """Two tensor-parallel ranks report the figures of the unsharded model's logits."""
    unsharded = run_ranks(1, runs.reference)[0]
    case = Case("per_token", True, data=(0, 3), each=2, step=step, options={"report": ALL})
    for (result,) in run_ranks(2, runs.train, unsharded["weights"], [case], tp=2):
        for index, report in zip(case.data, result["collected"], strict=True):
            micro_batch = runs.micro_batches()[index]
            logits = unsharded["parts"][index]["logits"]
            for name, pair in wanted(
                logits, micro_batch["tokens"], micro_batch["loss_mask"]
            ).items():
                torch.testing.assert_close(
                    report[name], torch.tensor([float(x) for x in pair]), rtol=1e-5, atol=1e-6
                )


def test_figures_with_the_gradient_in_forward_are_refused():
    logits, labels, mask = batch()
    with pytest.raises(NotImplementedError, match="expected no grad_in_forward where more than"):
        sft_loss_func(labels, mask, logits * 1, report=ALL, grad_in_forward=True)


@pytest.mark.parametrize("report", ["lm loss", ("lm loss", "recall"), ("loss",)])
def test_report_of_another_name(report):
    logits, labels, mask = batch()
    with pytest.raises(ValueError, match="report: expected a tuple of"):
        sft_loss_func(labels, mask, logits, report=report)


@pytest.mark.parametrize(
    ("count", "kind"),
    [
        (torch.tensor(3.0), TypeError),
        (3, TypeError),
        (torch.tensor([3]), TypeError),
        (torch.tensor(True), TypeError),
    ],
)
def test_trap_float_num_tokens(count, kind):
    """The schedule adds num_tokens to an integer tensor, where an error is hard to trace."""
    logits, labels, mask = batch()
    with pytest.raises(kind, match="num_tokens: expected a 0-d int32 or int64 tensor"):
        sft_loss_func(labels, mask, logits, num_tokens=count)


def test_num_tokens_of_the_trainer():
    logits, labels, mask = batch()
    loss, count, report = sft_loss_func(labels, mask, logits, num_tokens=torch.tensor(40))
    assert count == 40 and report["lm loss"][1] == 40 and report["lm loss"][0] == loss
    with pytest.raises(ValueError, match="num_tokens: expected None with returns='mean'"):
        sft_loss_func(labels, mask, logits, returns="mean", num_tokens=torch.tensor(40))


class Machine:
    """A rerun state machine that records its calls and rejects like Megatron's."""

    def __init__(self):
        self.asked = []

    def validate_result(self, *, result, rejection_func, message, tolerance, fatal):
        assert result.dim() == 0 and not result.requires_grad and tolerance == 0.0
        self.asked.append(message)
        if rejection_func(result) and fatal:
            raise RuntimeError(message)

    def is_unexpectedly_large(self, result, threshold, context):
        return result > threshold


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    module = SimpleNamespace(get_rerun_state_machine=lambda: machine)
    monkeypatch.setitem(sys.modules, "megatron.core.rerun_state_machine", module)
    return machine


NAN, INF = (f"found {what} in local forward loss calculation" for what in ("NaN", "Inf"))


def test_checks_are_those_that_the_run_asks_for(machine, monkeypatch):
    logits, labels, mask = batch()
    sft_loss_func(labels, mask, logits)
    assert machine.asked == [], "no run, no check, no host read"
    args = SimpleNamespace(check_for_nan_in_loss_and_grad=True, check_for_spiky_loss=True)
    stand_in = SimpleNamespace(get_args=lambda: args)
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", stand_in)
    sft_loss_func(labels, mask, logits)
    assert machine.asked == [NAN, INF, "Spiky loss"]
    machine.asked.clear()
    sft_loss_func(labels, mask, logits, check_for_nan=False)
    assert machine.asked == ["Spiky loss"]


@pytest.mark.parametrize(("value", "message"), [("nan", NAN), ("inf", INF)])
def test_a_bad_loss_stops_the_run(machine, value, message):
    logits, labels, mask = batch()
    scored = int((mask[0, 1:] != 0).nonzero()[0])
    with torch.no_grad():
        if value == "nan":
            logits[0, scored, 0] = float("nan")
        else:
            logits[0, scored, labels[0, scored + 1]] = -float("inf")
    with pytest.raises(RuntimeError, match=message):
        sft_loss_func(labels, mask, logits, check_for_nan=True)
    sft_loss_func(labels, mask, logits)


def megatrons_machine():
    """The real one, reruns disabled: fatal results raise, a spiky loss warns."""
    init()
    from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine

    initialize_rerun_state_machine(mode=RerunMode.DISABLED)
    logits, labels, mask = batch()
    asked = {"check_for_nan": True, "check_for_spiky": True}
    sft_loss_func(labels, mask, logits, **asked)
    with pytest.raises(RuntimeError, match=NAN):
        sft_loss_func(labels, mask, logits * float("nan"), **asked)
    return True


def test_the_real_rerun_state_machine_takes_the_checks():
    assert run_ranks(1, megatrons_machine) == [True]


def test_perplexity_is_exp_of_the_nll_per_token():
    """expm1 and a count, so that masked rows add nothing: compared with token_metrics."""
    logits, labels, mask = batch()
    metrics = fsl.token_metrics(logits, labels, mask)
    per_token = torch.where(metrics.lse != 0, (-metrics.log_prob).exp(), 0.0).sum()
    report = sft_loss_func(labels, mask, logits, report=("perplexity",))[-1]
    torch.testing.assert_close(report["perplexity"][0], per_token)

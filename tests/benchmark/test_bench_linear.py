"""`python -m bench linear`: its oracle, its providers, its record and its table."""

import importlib
import inspect
import statistics
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from codegen_runs import PEERS as INSTALLED
from codegen_runs import needs_liger

from bench.__main__ import main
from bench.kernels import record as kernels_record
from bench.kernels import timing
from bench.kernels.cases import DTYPES
from bench.kernels.problem import UPSTREAM
from bench.linear import products, providers, record, worker
from bench.linear.case import Case, Problem, run_once
from bench.linear.oracle import Oracle
from bench.linear.providers import PROVIDERS

SMALL = Case(rows=24, hidden=16, vocab=203, scored=1.0, dtype="fp32", chunk_rows=5, seed=3)
HERE = [one for one in PROVIDERS.values() if one.reason_against(SMALL, "cpu") is None]


def exact(problem):
    """Loss and gradients by autograd in float64, from all rows at once."""
    hidden, weight = (
        tensor.detach().double().requires_grad_() for tensor in (problem.flat, problem.weight)
    )
    loss = F.cross_entropy(hidden @ weight.t(), problem.target, ignore_index=-100)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight), problem.upstream.double())


@pytest.mark.parametrize("scored", [1.0, 0.3])
@pytest.mark.parametrize("limits", [(64, 2048), (4, 20)])
def test_the_oracle_is_the_definition(monkeypatch, scored, limits):
    """Also where it compares some rows, and where it takes the vocabulary in parts."""
    monkeypatch.setattr("bench.linear.oracle.ROWS", limits[0])
    monkeypatch.setattr("bench.linear.oracle.COLUMNS", limits[1])
    monkeypatch.setattr("bench.linear.oracle.CHUNK", 24 * 50)
    problem = Problem(replace(SMALL, scored=scored), "cpu")
    oracle, (loss, hidden, weight) = Oracle(problem), exact(problem)
    assert oracle.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(oracle.hidden, hidden[oracle.rows], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(oracle.weight, weight[oracle.columns], rtol=1e-6, atol=1e-12)
    assert 0 < oracle.is_target.sum() < len(oracle.columns)
    assert len(oracle.rows) == min(limits[0], problem.case.scored_rows)
    check = oracle.check(loss, hidden, weight, "fp32")
    assert check.ok and check.gradient_error < 1e-6


def _scaled(problem, oracle, loss, hidden, weight):
    return loss, hidden / UPSTREAM, weight / UPSTREAM


def _biased(problem, oracle, loss, hidden, weight):
    return loss * 1.001, hidden, weight


def _leaking(problem, oracle, loss, hidden, weight):
    hidden[0, 0] += 1e-9  # in a row that is not scored
    return loss, hidden, weight


def _coarse(problem, oracle, loss, hidden, weight):
    """Rows of weight that are no target are off by 10 %; their gradients are small."""
    weight[oracle.columns[~oracle.is_target]] *= 1.1
    return loss, hidden, weight


def _nan(problem, oracle, loss, hidden, weight):
    weight[oracle.columns[oracle.is_target][0], 0] = torch.nan
    return loss, hidden, weight


@pytest.mark.parametrize("wrong", [_scaled, _biased, _leaking, _coarse, _nan])
def test_a_wrong_result_does_not_pass(wrong):
    problem = Problem(replace(SMALL, scored=0.3), "cpu")
    oracle = Oracle(problem)
    assert oracle.check(*exact(problem), "fp32").ok
    check = oracle.check(*wrong(problem, oracle, *exact(problem)), "fp32")
    assert not check.ok and check.reason.startswith("wrong: ")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scored", [1.0, 0.3])
@pytest.mark.parametrize("provider", HERE, ids=lambda one: one.name)
def test_each_provider_matches_the_oracle(provider, scored, dtype):
    for chunk_rows in (5, None):
        case = replace(SMALL, scored=scored, dtype=dtype, chunk_rows=chunk_rows)
        problem = Problem(case, "cpu")
        result = run_once(provider.build(problem), problem)
        check = Oracle(problem).check(*result, provider.precision(problem))
        assert check.ok, check.reason


def test_those_that_run_on_a_cpu_are_all_but_liger_and_quack():
    away = {one.name: one.reason_against(SMALL, "cpu") for one in PROVIDERS.values()}
    reasons = {name: reason for name, reason in away.items() if reason}
    if not hasattr(F, "linear_cross_entropy"):
        old = {name: reasons.pop(name) for name in ("torch-linear", "torch-linear-chunked")}
        assert all("needs torch >= 2.13" in reason for reason in old.values())
    assert reasons == dict.fromkeys((*LIGER_LINEAR, "quack-linear"), "runs on GPUs")


def test_products_that_take_too_long_are_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(providers, "_cpu_speed", lambda dtype: 1e3)
    reason = PROVIDERS["logits-ours"].reason_against(SMALL, "cpu")
    seconds = 3 * 2 * 24 * 16 * 203 / 1e3
    assert reason.startswith(f"predicted {seconds:,.0f} s, --limit is 60 s")
    assert PROVIDERS["logits-ours"].reason_against(replace(SMALL, limit=1e9), "cpu") is None
    assert PROVIDERS["ours-linear"].reason_against(SMALL, "cpu") is None  # not in its own dtype


def test_a_loss_that_computes_logits_twice_has_four_products():
    assert products.seconds_of([(1.0, 2.5), (2.0, 5.0)], 3) == [3.5, 7.0]
    assert products.seconds_of([(1.0, 2.5), (2.0, 5.0)], 4) == [4.5, 9.0]
    four = {name for name, one in PROVIDERS.items() if one.products == 4}
    assert four == {"ours-linear", "chunked"}


def test_the_bare_products_are_those_of_the_scored_rows():
    problem = Problem(replace(SMALL, scored=0.3, dtype="bf16"), "cpu")
    made = []

    class Clock:
        start = mark = staticmethod(lambda: made.append("mark"))

    contender = products.contender(problem)
    with _Counted() as counted:
        contender.run(Clock)
    rows, case = problem.case.scored_rows, problem.case
    shapes = [(rows, case.hidden, case.vocab), (rows, case.vocab, case.hidden)]
    assert counted.shapes == [*shapes, (case.vocab, rows, case.hidden)]
    assert made == ["mark"] * 3


class _Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """The shapes (m, k, n) of all products."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "aten.mm" in str(function):
            self.shapes.append((*args[0].shape, args[1].shape[1]))
        return function(*args, **(kwargs or {}))


def test_memory_is_counted_beyond_inputs_and_gradients():
    case = replace(SMALL, rows=256, vocab=20_000, chunk_rows=16)
    problem = Problem(case, "cpu")
    whole = worker.footprint(PROVIDERS["logits-ours-inplace"], problem)
    assert case.logits_bytes <= whole.full < case.logits_bytes * 1.05
    ours = worker.footprint(PROVIDERS["ours-linear"], problem)
    chunk = case.chunk_bytes("cpu")
    assert chunk == 16 * 20_000 * 4
    assert chunk <= ours.full < 2 * chunk


ROW = {"case", "provider", "title", "status", "reason", "check", "memory", "products", "chunks"}
ROW |= set(record.TIMED)


def test_the_record_and_its_table(tmp_path, capsys):
    size = "--rows 32 --hidden 16 --vocab 500 --chunk-rows 8 --scored 1 0.3 --seconds 0".split()
    assert main(["linear", *size, "--device", "cpu", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "ours (linear, grad in forward)" in printed and "3 bare products" in printed
    assert "\x1b" not in printed and "not run: Liger fused linear" in printed
    assert not list(tmp_path.glob("*.json"))  # bench readme reads those
    data = kernels_record.read(tmp_path / "linear" / "cpu.json")
    assert data["finished"] and "bench linear" in data["machine"]["command"]
    assert [case["scored_rows"] for case in data["cases"]] == [31, 10]
    for row in data["rows"]:
        assert row.keys() == ROW and row["status"] in kernels_record.STATUSES
        if row["status"] == "unavailable":
            assert row["case"] is None and row["reason"] and not row["ms"]
            continue
        assert row["status"] == "ok" and row["check"]["ok"], row["reason"]
        case = data["cases"][row["case"]]
        assert len(row["samples_ms"]) >= timing.FEWEST
        middle = statistics.median(row["samples_ms"])
        assert row["ms"]["p50"] == pytest.approx(middle, abs=1e-3)
        bare = case["products"][{3: "three_ms", 4: "four_ms"}[row["products"]]]
        assert row["x_products"] == pytest.approx(row["ms"]["p50"] / bare)
        assert row["chunks"] == pytest.approx(row["memory"]["full"] / case["chunk_bytes"])
    assert {row["provider"] for row in data["rows"]} == set(PROVIDERS)
    assert f"{data['rows'][0]['memory']['full']:,}" in printed


def test_a_wrong_loss_of_ours_is_a_broken_promise(capsys):
    from bench.linear import table

    row = {"case": 0, "provider": "ours-linear", "title": "ours", "status": "wrong"}
    data = {"cases": [{"name": "small"}], "rows": [{**row, "reason": "off"}]}
    assert table.verdict(data) == 1
    assert capsys.readouterr().err == "bench: broken promise: small: ours: wrong: off\n"
    data["rows"][0] |= {"provider": "chunked"}
    assert table.verdict(data) == 0


def test_wrong_use_is_one_line_and_says_what_is_right(capsys):
    wrong = {
        "--rows: expected at least 2, got 1": ["--rows", "1"],
        "--chunk-rows: expected a positive number": ["--chunk-rows", "0"],
        "--scored: expected parts above 0": ["--scored", "0"],
        "did you mean ours-linear?": ["--provider", "our-linear"],
        "choose a smaller --rows, --hidden or --vocab": ["--vocab", "1000000000"],
    }
    for message, arguments in wrong.items():
        assert main(["linear", "--device", "cpu", *arguments]) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("bench: ") and errors.count("\n") == 1 and message in errors


def liger_fused_linear_cross_entropy(
    input,
    weight,
    target,
    bias=None,
    ce_weight=None,
    ignore_index=-100,
    lse_square_scale=0.0,
    label_smoothing=0.0,
    reduction="mean",
    softcap=None,
    return_z_loss=False,
    accum_dtype=None,
    use_token_scaling=False,
    return_token_accuracy=False,
    return_predicted_tokens=False,
    chunk_mem_const=1,
):
    """Stands for Liger's function on a CPU."""
    assert input.dim() == 2 and accum_dtype in (None, torch.float32)
    logits = F.linear(input, weight).float()
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)


def chunked_linear_cross_entropy(
    x,
    weight,
    target,
    chunk_size=4096,
    ignore_index=-100,
    reduction="mean",
    tuned=True,
    use_scaled_exp=None,
):
    """Stands for quack's function on a CPU."""
    assert x.dim() == 2 and chunk_size % 8 == 0 and len(x) % 8 == 0
    logits = F.linear(x, weight).float()
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)


LIGER = "liger_kernel.transformers.functional"
LIGER_LINEAR = ("liger-linear", "liger-linear-fp32")
STAND_INS = {
    LIGER: liger_fused_linear_cross_entropy,
    "quack.linear_cross_entropy": chunked_linear_cross_entropy,
}


@pytest.mark.parametrize("chunk_rows", [8, None])
@pytest.mark.parametrize("name", [*LIGER_LINEAR, "quack-linear"])
def test_a_peer_s_adapter_gives_the_oracle_s_loss_and_gradients(monkeypatch, name, chunk_rows):
    for module, function in STAND_INS.items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
        setattr(sys.modules[module], function.__name__, function)
    case = replace(SMALL, scored=0.5, dtype="bf16", chunk_rows=chunk_rows)
    problem = Problem(case, "cpu")
    result = run_once(PROVIDERS[name].build(problem), problem)
    check = Oracle(problem).check(*result, PROVIDERS[name].precision(problem))
    assert check.ok, check.reason


@needs_liger
def test_liger_has_the_signature_that_its_stand_in_has():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(INSTALLED))
        theirs = importlib.import_module(LIGER).liger_fused_linear_cross_entropy
        ours = liger_fused_linear_cross_entropy
        assert list(inspect.signature(theirs).parameters) == list(
            inspect.signature(ours).parameters
        )
        for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
            patch.delitem(sys.modules, name)

"""`python -m bench launches`: other lines of the launch tables give the same results."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from backends import ON_SHIM
from bench_processes import ROOT
from bench_providers import case_of

from bench.gpu import launches, lines
from bench.kernels.cases import Model
from bench.kernels.problem import Problem, Source

needs_shim = pytest.mark.skipif(not ON_SHIM, reason="no Boost.Context, or no C++ compiler")


def work_of(kernels, softcap=None):
    case = case_of(Model("narrow", 4500, 4500, softcap), seq=4, scored=1.0)
    return lines.Work(kernels, Problem(case, Source(case.source, "cpu", copies=1)))


@needs_shim
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_other_lines_give_the_results_of_the_table_s(softcap):
    """The device code runs on the CPU, thread by thread."""
    backend = lines.backends("cpu")["cuda"]
    work = work_of(backend.kernels, softcap)
    for kernel in backend.uses(work):
        before = next(backend.candidates(kernel, work.case))
        row = launches._row("cuda", backend, kernel, work, 0.0)
        assert row["status"] == "ok" and len(row["lines"]) > 3, row
        assert all(isinstance(ms, float) for ms in row["lines"].values()), row
        assert row["best_ms"] <= row["table_ms"] and row["table"] == str(before)
        assert next(backend.candidates(kernel, work.case)) == before  # the table's again


@needs_shim
@pytest.mark.parametrize("threads, segment", [(96, 4096), (2048, 65536), (128, 5000)])
def test_a_line_that_cannot_be_launched_cannot_be_tried(threads, segment):
    module = lines.backends("cpu")["cuda"].kernels.module
    with pytest.raises(ValueError, match="expected 64 to 1024 threads in whole waves"):
        module.try_line("row_stats", threads, segment, 0)
    with pytest.raises(ValueError, match="expected row_stats, row_grad or row_stats_grad, got x"):
        module.try_line("x", 64, 4096, 0)


class Faked:
    """Lines of a backend whose third line gives another gradient, and whose second is refused."""

    kernels = None

    def candidates(self, kernel, case):
        yield from ("table", "refused", "other")

    def trying(self, kernel, line):
        self.line = line
        return nullcontext()


class FakedWork:
    device, same = torch.device("cpu"), lines.Work.same

    def __init__(self, backend, off, of="other"):
        self.case, self.backend, self.off, self.of = case_of(), backend, off, of

    def run(self, kernel):
        if self.backend.line == "refused":
            raise RuntimeError("row_grad: too many resources requested")

    def result(self, kernel):
        self.run(kernel)
        return None, torch.ones(4) + (self.off if self.backend.line == self.of else 0.0)


@pytest.mark.parametrize("off", [0.0, 0.1, float("nan")])
def test_a_line_with_another_result_fails_and_one_that_is_refused_does_not(off):
    backend = Faked()
    row = launches._row("cuda", backend, "row_grad", FakedWork(backend, off), 0.0)
    assert "too many resources" in row["lines"]["refused"]
    if off == 0.0:
        assert row["status"] == "ok" and row["best"] in ("table", "other")
    else:
        assert row["status"] == "wrong" and "other: its result is not that" in row["reason"]
        assert "wrong" in launches.sentence(row)


def test_triton_which_compiles_every_line_comes_last(monkeypatch):
    """The part has a limit; the compiled backend tries its lines in a tenth of the time."""
    monkeypatch.setattr(launches, "CPU_WIDTHS", (("gpt2", 8), ("gpt2", 4)))
    monkeypatch.setattr(launches, "_row", lambda name, *_: name)
    fakes = {name: SimpleNamespace(kernels=None, uses=lambda work: "a") for name in ("cuda", "t")}
    assert list(launches.measured(fakes, "cpu", 0.0)) == ["cuda", "cuda", "t", "t"]


def test_a_table_s_line_that_gives_nan_fails():
    backend = Faked()
    work = FakedWork(backend, float("nan"), of="table")
    row = launches._row("cuda", backend, "row_grad", work, 0.0)
    assert row["status"] == "wrong" and "table: its result is not finite" in row["reason"]


def test_a_search_says_what_it_would_change():
    def found(table, other):
        times = {"table": table, "other": other}
        return {name: {"status": "ok", "reason": None, "ms": ms} for name, ms in times.items()}

    where = {"backend": "cuda", "kernel": "row_grad", "model": "gpt2", "columns": 50257}
    row = {**where, **launches.summary(["table", "other"], found(1.0, 0.9))}
    assert row["gain"] == pytest.approx(0.1) and "0.900 ms (-10%) with other" in (
        launches.sentence(row)
    )
    row = {**where, **launches.summary(["table", "other"], found(1.0, 0.99))}
    assert "none of 1 other lines is 3% faster" in launches.sentence(row)


@pytest.mark.long
def test_the_candidates_of_autotuning_are_timed_in_triton_s_interpreter(tmp_path):
    pytest.importorskip("triton")
    path = tmp_path / "record.json"
    command = [sys.executable, "-m", "bench", "launches", "--device", "cpu", "--backend", "triton"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--seconds", "0", "--json", str(path)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["kernel"] for row in rows] == ["row_stats", "row_grad"]
    assert all(row["status"] == "ok" and len(row["lines"]) > 5 for row in rows)


def test_a_checkout_that_is_not_installed_has_the_triton_kernels():
    """Their folder is beside the package. -S: without the editable installation's finder."""
    program = """
import sys
sys.path += {paths!r}
import importlib.util as find
import fused_sft_loss
assert find.find_spec("fused_sft_loss.triton_kernels") is None
import bench
spec = find.find_spec("fused_sft_loss.triton_kernels")
assert spec.origin == {origin!r}, spec
"""
    packages = [path for path in sys.path if path.endswith("site-packages")]
    origin = str(ROOT / "triton_kernels/__init__.py")
    text = program.format(paths=[str(ROOT), *packages], origin=origin)
    done = subprocess.run([sys.executable, "-S", "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

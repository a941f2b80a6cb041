"""The runner of `python -m bench gpu`, with parts that stand for real ones: no GPU is needed."""

import os
import signal
import subprocess
import sys
import time

import pytest
from bench_processes import ROOT, alive, interrupted, new_mark, start
from test_bench_gpu_outcomes import rows_of

from bench import interrupts
from bench.__main__ import main
from bench.gpu import command, runner
from bench.gpu import record as gpu_record
from bench.gpu.found import Found
from bench.gpu.runner import FAILED, PASSED, SKIPPED, Part, Result, Runner, verdict
from bench.kernels import record


def part(name, program, limit=60.0, **options):
    return Part(name, f"part {name}", [sys.executable, "-c", program], limit, **options)


#: A part that is interrupted writes what it has, as the benchmarks do.
KEEPS = """
import pathlib, sys, time
try:
    print("working", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[1]).write_text("kept")
"""
#: A part that hangs, with a child, and does not listen to an interrupt.
DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
time.sleep(60)
"""


def test_each_part_says_what_came_of_it(tmp_path):
    saved = []
    parts = [
        part("good", "print('fine')"),
        part("bad", "print('one'); print('bench: it is wrong'); raise SystemExit(1)"),
        part("absent", "raise SystemExit(1)", skip="needs a hammer: pip install hammer"),
        part("set", "import os; print(os.environ['A'])", environment=(("A", "b"),)),
    ]
    results = Runner(tmp_path, save=lambda results: saved.append(len(results))).run(parts)
    assert [result.status for result in results] == [PASSED, FAILED, SKIPPED, PASSED]
    assert results[1].text == "bench: it is wrong" and "hammer" in results[2].line
    assert (tmp_path / "set.log").read_text() == "b\n" and saved == [1, 2, 3, 4]
    status, last = verdict(results)
    assert status == 1 and last == "verdict: FAILED (2 passed, 1 failed, 1 skipped): part bad"


def test_a_part_that_reaches_its_limit_keeps_what_it_has(tmp_path):
    keeps = part("keeps", KEEPS, 2 * runner.SHORTEST)
    keeps = Part(**{**vars(keeps), "command": [*keeps.command, str(tmp_path / "kept")]})
    budget = runner.BUDGET / 5  # four seconds are its limit
    with interrupts.raised():  # a shell's background jobs ignore SIGINT, and so would the part
        (result,) = Runner(tmp_path, budget).run([keeps])
    assert (tmp_path / "kept").read_text() == "kept"
    assert result.status == FAILED and "not finished after" in result.text


def test_a_part_that_does_not_listen_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_S", 0.5)
    mark = new_mark()
    deaf = part("deaf", DEAF, environment=(("BENCH_TEST_MARK", mark),))
    ended, stopped = runner.run_one(deaf, tmp_path / "log", 3.0)
    assert ended.late and not stopped and ended.status == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while alive(mark):
        assert time.monotonic() < deadline
        time.sleep(0.1)


INTERRUPTED = """
import signal, sys
from bench import interrupts
from bench.gpu import runner
keeps = {keeps!r}
parts = [
    runner.Part("one", "one", [sys.executable, "-c", "print(1)"], 60),
    runner.Part("two", "two", [sys.executable, "-c", keeps, {path!r}], 60),
    runner.Part("three", "three", [sys.executable, "-c", "print(3)"], 60),
]
with interrupts.raised(signal.SIGTERM):
    running = runner.Runner({folder!r}, root={root!r})
    results = running.run(parts)
status, last = runner.verdict(results, running.interrupted)
print(last)
raise SystemExit(status)
"""


def test_the_same_interrupt_twice_does_not_end_the_cleaning_up():
    """`timeout` signals a process, then its whole group."""
    cleaned = []
    with interrupts.raised(signal.SIGTERM):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(1)
    assert cleaned == [1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_part_and_keeps_the_results(tmp_path, number):
    path = str(tmp_path / "kept")
    text = INTERRUPTED.format(keeps=KEEPS, path=path, folder=str(tmp_path), root=str(ROOT))
    process = subprocess.Popen(
        [sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    log, deadline = tmp_path / "two.log", time.monotonic() + 120
    while not log.exists() or "working" not in log.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and (tmp_path / "kept").read_text() == "kept"
    words = [line.split()[0] for line in output.splitlines() if line.startswith("  ")]
    assert words == [PASSED, SKIPPED, SKIPPED]
    assert output.splitlines()[-1] == (
        "verdict: INTERRUPTED (1 passed, 0 failed, 2 skipped): what was measured is kept"
    )


def test_a_verdict_without_a_check_is_no_success():
    skipped = Result("a", "a", SKIPPED, "no torch")
    assert verdict([skipped]) == (
        1,
        "verdict: nothing was checked (0 passed, 0 failed, 1 skipped)",
    )
    assert verdict([skipped, Result("b", "b", PASSED, "")])[0] == 0
    assert verdict([Result("b", "b", FAILED, "")], interrupted=True)[0] == 1


def test_without_a_gpu_the_verdict_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "look", lambda device: Found(why="no driver"))
    assert main(["gpu", "--out", str(tmp_path)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "verdict: no GPU: nothing was checked (no driver)"


def test_without_torch_the_verdict_says_so(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = command.look("cuda")
    assert found.device is None and "no torch here" in found.why


def test_wrong_use_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "look", lambda device: FOUND)
    wrong = {"--budget: expected a number": ["--budget", "0"], "--only: expected": ["--only", "x"]}
    for message, arguments in wrong.items():
        assert main(["gpu", "--out", str(tmp_path), *arguments]) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("bench: ") and errors.count("\n") == 1 and message in errors


FOUND = Found("cuda", "", "a-gpu", "cuda", {"cuda": None, "triton": None}, True, "9.0a", "nvcc 13")


def test_the_records_of_all_benchmarks_become_one(tmp_path):
    """The README's generator reads one record for each device."""
    from bench.gpu import parts

    whole = record.read(ROOT / "bench/results/nvidia-h100-80gb-hbm3.json")
    (tmp_path / "parts").mkdir()
    written = gpu_record.Written(FOUND, tmp_path, "python -m bench gpu")
    halves = []
    for name, wanted in (("kernels-1", {2, 3}), ("kernels-2", {0, 1, 4, 5})):
        order = sorted(wanted)
        rows = [
            {**row, "case": None if row["case"] is None else order.index(row["case"])}
            for row in whole["rows"]
            if row["case"] is None or row["case"] in wanted
        ]
        half = {**whole, "cases": [whole["cases"][n] for n in order], "rows": rows}
        record.write(half, parts.record_path(tmp_path, name))
        halves.append(half)
    unfinished = rows_of("pending") | {"finished": False, "machine": {}, "settings": {}}
    record.write(unfinished, parts.record_path(tmp_path, "kernels-3"))
    written([Result("a", "tests", PASSED, "41 passed")])
    merged = record.read(tmp_path / "a-gpu.json")
    assert len(merged["cases"]) == 6 and merged["machine"]["command"] == "python -m bench gpu"
    assert len(merged["rows"]) == len(whole["rows"])
    for one in merged["rows"]:
        if one["case"] is not None:
            case = merged["cases"][one["case"]]
            (same,) = [
                row
                for row in whole["rows"]
                if row["case"] is not None
                and whole["cases"][row["case"]] == case
                and row["provider"] == one["provider"]
            ]
            assert same["ms"] == one["ms"]
    page = (tmp_path / "a-gpu.md").read_text()
    assert "| tests | PASSED |" in page and "| ours (cuda), in place |" in page
    assert written.files() == [tmp_path / "a-gpu.json", tmp_path / "a-gpu.md"]


def test_files_of_an_earlier_run_are_not_taken_for_this_one_s(tmp_path):
    from bench.gpu import parts

    (tmp_path / "parts").mkdir()
    path = parts.record_path(tmp_path, "kernels-1")
    record.write(record.read(ROOT / "bench/results/cpu.json"), path)
    os.utime(path, (1, 1))
    gpu_record.Written(FOUND, tmp_path, "")([Result("a", "a", PASSED, "")])
    assert not (tmp_path / "a-gpu.json").exists()


@pytest.mark.long
def test_a_rehearsal_on_a_cpu_measures_and_writes_a_record(tmp_path):
    only = ("--only", "kernels-1", "test-triton", "sanitize-memcheck")
    process = start("gpu", "--device", "cpu", "--out", str(tmp_path), *only)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, output + errors
    assert output.splitlines()[-1] == "verdict: PASSED (1 passed, 0 failed, 2 skipped)"
    assert record.read(tmp_path / "cpu.json")["finished"]
    assert "| ours (eager), in place |" in (tmp_path / "cpu.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_batch_system_and_a_closed_terminal_interrupt_the_command(monkeypatch, tmp_path, number):
    """Both end a job with a signal. A part would go on alone, because it is its own session."""

    def stopped(device):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal came too late")

    monkeypatch.setattr(command, "look", stopped)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert main(["gpu", "--out", str(tmp_path)]) == 130
    finally:
        signal.signal(number, before)


def test_nohup_keeps_the_command_when_the_terminal_is_closed(monkeypatch, tmp_path):
    def closed(device):
        os.kill(os.getpid(), signal.SIGHUP)
        return Found(why="still here")

    monkeypatch.setattr(command, "look", closed)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["gpu", "--out", str(tmp_path)]) == 1
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.long
def test_an_interrupted_command_is_over_at_once_and_leaves_nobody_behind(tmp_path):
    mark = new_mark()
    only = ("--device", "cpu", "--only", "kernels-1", "--out", str(tmp_path))
    process = start("gpu", *only, mark=mark)
    deadline = time.monotonic() + 240
    while not (tmp_path / "logs/kernels-1.log").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    assert "Traceback" not in interrupted(process, mark)

"""How `python -m bench gpu` shares its time out to the parts."""

from test_bench_gpu import FOUND, part

from bench.__main__ import main
from bench.gpu import command, runner
from bench.gpu.runner import PASSED, SKIPPED, Ended, Runner


def test_a_benchmark_is_told_when_to_begin_with_no_further_row(tmp_path):
    """What it has checked by then is timed before its limit."""
    stops = part("stops", "import sys; print(sys.argv[1:])", 100.0, stop="--stop")
    Runner(tmp_path).run([stops])
    assert (tmp_path / "stops.log").read_text() == "['--stop', '55']\n"


def test_the_search_for_a_gpu_is_part_of_the_budget(tmp_path, monkeypatch):
    """A driver may take a minute to start."""
    clock = [100.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])

    def look(device):
        clock[0] += 60.0
        return FOUND

    monkeypatch.setattr(command, "look", look)
    budgets = []
    monkeypatch.setattr(Runner, "run", lambda self, parts: budgets.append(self.budget) or [])
    main(["gpu", "--budget", "500", "--out", str(tmp_path)])
    assert budgets == [440.0]


def test_tests_leave_time_to_the_benchmark(tmp_path, monkeypatch):
    """A part gets at most its limit, and at most what later ones and its grace leave."""
    given = {}

    def took(part, log, limit, root):
        given[part.name] = limit
        clock[0] += spent.get(part.name, 0.0)
        return Ended(0, False, 0.0, log), False

    clock, spent = [0.0], {"slow": 395.0, "first": 100.0}
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(runner, "run_one", took)
    parts = [
        part("first", "", 150, outcome=lambda ended: (PASSED, "")),
        part("slow", "", 500, outcome=lambda ended: (PASSED, "")),
        part("third", "", 200, outcome=lambda ended: (PASSED, "")),
        part("away", "", 50, least=40, skip="not here"),
        part("wanted", "", 400, least=100, outcome=lambda ended: (PASSED, "")),
    ]
    results = Runner(tmp_path).run(parts)
    assert given == {"first": 150, "slow": 385, "wanted": 90}
    assert results[2].status == SKIPPED and "raise --budget" in results[2].text
    given.clear()
    clock[0], spent = 0.0, {}
    Runner(tmp_path, budget=300).run(parts)  # limits shrink with the budget
    assert given["first"] == 75 and given["wanted"] == 200

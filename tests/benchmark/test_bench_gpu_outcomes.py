"""What `python -m bench gpu` concludes from the output and the record of a part."""

import json
import sys

import pytest
from bench_providers import case_of

from bench.gpu import outcomes
from bench.gpu.runner import FAILED, PASSED, SKIPPED, Ended, Part, Runner


def ended(tmp_path, text, status=0, late=False):
    log = tmp_path / "log"
    log.write_text(text)
    return Ended(status, late, 12.0, log)


@pytest.mark.parametrize(
    ("text", "status", "late", "expected"),
    [
        ("....\n41 passed, 3 skipped in 63.20s (0:01:03)\n", 0, False, PASSED),
        ("2 tests skipped: no hammer\n4 skipped, 12 deselected in 1.20s\n", 0, False, SKIPPED),
        ("12 deselected in 1.20s\n", 5, False, SKIPPED),
        ("FAILED tests/a.py::test_x[cuda] - Ass\n1 failed, 2 passed in 3.0s\n", 1, False, FAILED),
        ("ImportError: no such file\n", 4, False, FAILED),
        ("41 passed in 63.20s\n", 2, True, FAILED),
    ],
)
def test_the_outcome_of_tests(tmp_path, text, status, late, expected):
    """pytest's exit status is 0 if all tests were skipped, and then nothing was checked."""
    got, said = outcomes.tests(ended(tmp_path, text, status, late))
    assert got == expected and said
    if "test_x" in text:
        assert "test_x[cuda]" in said
    if "hammer" in text:
        assert said == "no hammer"


def test_a_sanitizer_that_is_slow_has_found_nothing_and_says_so(tmp_path):
    late = outcomes.sanitized(ended(tmp_path, "..\n", 130, late=True))
    assert late == (SKIPPED, "not finished after 12 s, and no error until then")
    text = "..\n========= ERROR SUMMARY: 2 errors\n"
    assert outcomes.sanitized(ended(tmp_path, text, 130, late=True))[0] == FAILED


@pytest.mark.parametrize(
    ("text", "status", "expected"),
    [
        ("3 passed in 9.1s\n========= ERROR SUMMARY: 0 errors\n", 0, PASSED),
        ("3 passed in 9.1s\n========= ERROR SUMMARY: 2 errors\n", 9, FAILED),
        ("3 passed in 9.1s\n====== RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n", 0, PASSED),
        ("3 passed in 9.1s\n====== RACECHECK SUMMARY: 1 hazard displayed (1 error)\n", 9, FAILED),
        ("3 passed in 9.1s\n", 0, FAILED),
        ("Error: Device not supported\n", 1, SKIPPED),
        ("Error: process didn't terminate successfully\n", 255, FAILED),
    ],
)
def test_the_outcome_of_a_sanitizer(tmp_path, text, status, expected):
    assert outcomes.sanitized(ended(tmp_path, text, status))[0] == expected


def rows_of(*statuses, provider="ours-cuda-inplace"):
    fine = {"reason": "off", "memory": None, "speedup": None, "ms": None, "title": provider}
    rows = [{"case": 0, "provider": provider, "status": status, **fine} for status in statuses]
    return {"schema": 1, "cases": [vars(case_of()) | {"rows": 2, "logits_bytes": 1}], "rows": rows}


@pytest.mark.parametrize(
    ("rows", "status", "late", "expected", "said"),
    [
        (rows_of("ok", "ok"), 0, False, PASSED, "2 rows"),
        (rows_of("ok", "pending"), 130, True, PASSED, "1 rows of 2; the time was over"),
        (rows_of("ok", "ok"), 130, True, PASSED, "2 rows; the time was over"),
        (rows_of("ok", "pending"), 0, False, PASSED, "1 rows of 2; the time was over"),
        (rows_of("pending"), 130, True, FAILED, "no row was measured"),
        (rows_of("ok", "wrong"), 1, False, FAILED, "1 broken promises, the first: "),
        (rows_of("wrong", "pending"), 130, True, FAILED, "broken"),
        (rows_of("ok", "wrong", provider="liger"), 0, False, PASSED, "2 rows"),
        (None, 1, False, FAILED, "no such model"),
    ],
)
def test_the_outcome_of_a_benchmark(tmp_path, rows, status, late, expected, said):
    path = tmp_path / "record.json"
    if rows:
        path.write_text(json.dumps(rows))
    outcome = outcomes.of_record(path, outcomes.of_kernels)
    got, text = outcome(ended(tmp_path, "bench: no such model\n", status, late))
    assert got == expected and said in text


def test_a_record_of_an_earlier_run_does_not_pass_for_this_one_s(tmp_path):
    """A part that is interrupted while it imports ends before it writes anything."""
    path = tmp_path / "record.json"
    path.write_text(json.dumps(rows_of("ok", "ok")))
    outcome = outcomes.of_record(path, outcomes.of_kernels)
    command = [sys.executable, "-c", "pass"]
    part = Part("stale", "stale", command, 60, outcome=outcome, record=path)
    (result,) = Runner(tmp_path).run([part])
    assert result.status == FAILED and "no row was measured" in result.text


TRAINED = {"reference": [10.0, 8.0], "ours": [10.00001, 8.01]}


@pytest.mark.parametrize(
    ("record", "status", "late", "expected", "said"),
    [
        ({"finished": True, "losses": TRAINED}, 0, False, PASSED, "2 steps"),
        ({"finished": False, "losses": TRAINED}, 130, True, PASSED, "2 steps; the time was over"),
        (
            {"finished": False, "losses": {**TRAINED, "ours": [10.0, 9.0]}},
            130,
            True,
            FAILED,
            "disagree",
        ),
        (
            {"finished": False, "losses": {"reference": [], "ours": []}},
            130,
            True,
            FAILED,
            "no step was finished in 12 s",
        ),
        (None, 130, True, FAILED, "no step was finished"),
        (None, 1, False, FAILED, "no such model"),
    ],
)
def test_the_outcome_of_a_training_run(tmp_path, record, status, late, expected, said):
    path = tmp_path / "result.json"
    if record:
        path.write_text(json.dumps(record))
    outcome = outcomes.of_training(path)
    got, text = outcome(ended(tmp_path, "bench: no such model\n", status, late))
    assert got == expected and said in text

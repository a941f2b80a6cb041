"""Run `python -m bench codegen` in a separate process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from csrc.toolchains import without

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "build/peers"


def _reason_without_liger():
    if reason := without.absent("liger"):
        return f"Liger is absent: {reason}"
    if not (PEERS / "liger_kernel").is_dir():
        return f"Liger is not in {PEERS}: make test installs it"
    return ""


needs_liger = pytest.mark.skipif(bool(_reason_without_liger()), reason=_reason_without_liger())


def codegen(folder, *arguments):
    """The JSON that it writes. TRITON_INTERPRET is unset, so that kernels are compiled."""
    path = folder / "records.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "codegen", "--json", str(path), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode in (0, 1) and path.exists(), done.stderr[-4000:]
    return json.loads(path.read_text())


def assert_not_above_liger(made) -> set:
    """No pass has more bytes or instructions; returns the (target, dtype, pass) compared."""
    from bench.without_gpu.codegen.table import pairs

    compared = set()
    for ours, loop, theirs, their_loop in pairs(made["records"], made["peer"]):
        where = (ours["target"], ours["name"], ours["columns"])
        for what in ("loaded", "stored", "instructions"):
            assert loop[what] <= their_loop[what], (*where, what, theirs["name"])
        compared.add((ours["target"], ours["dtype"], ours["pass"]))
    return compared


def assert_within_budgets(records, budgets, target: str) -> None:
    """The plain kernels use exactly the registers of `budgets` and have as many bytes in flight.

    The two-read kernels have enough bytes in flight that memory does not wait.
    """
    from bench.without_gpu.chips import CHIPS

    expected = {use: budget for (chip, use), budget in budgets.items() if chip == target}
    widest = [r for r in records if r["columns"] is None and r["use"] in expected]
    found = {}
    for r in widest:  # the first record of a use and dtype is the plain one
        found.setdefault((r["use"], r["dtype"]), r)
    for use, budget in expected.items():
        bf16, fp32 = found[use, "bfloat16"], found[use, "float32"]
        in_flight = bf16["loops"][bf16["pass"]]["in_flight"]
        got = type(budget)(bf16["registers"], fp32["registers"], in_flight / 1024)
        assert got == budget, (target, use, bf16["name"])
        if use in ("row_stats", "row_grad"):
            assert in_flight >= CHIPS[target].bytes_to_keep_in_flight


def assert_memory_bound(records) -> None:
    for r in records:
        predicted = r["loops"][r["pass"]]["predicted"]
        assert predicted["bound"] == "memory", (r["target"], r["name"], predicted)

"""Measure and write the tables of docs/megatron.md.

    python tests/megatron/megatron_docs.py [VERSION ...]

Runs every case of the exactness matrix, and the peaks, in a fresh process for each megatron-core of
build/megatron (or those named): a few minutes on two cores. `make megatron-docs` installs them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "megatron.md"
INSTALLED = ROOT / "build" / "megatron"

FAMILIES = {  # column of the table -> cases of test_megatron_exactness: it shows their worst error
    "3-tuple, per-token": (
        "per_token",
        "per_token, 1 micro-batch",
        "own forward_step, per_token",
        "gathered logits",
    ),
    "3-tuple, per micro-batch": ("per_token per micro-batch",),
    "2-tuple": ("mean", "mean, 1 micro-batch", "own forward_step, mean"),
    "per-sample": (
        "per_sample",
        "per_sample, in_place",
        "per_sample, head",
        "per_sample, linear",
        "per_sample, one context shard masked",
    ),
    "one CP shard masked": (
        "one context shard masked",
        "head, one context shard masked",
        "linear, one context shard masked",
    ),
    "all masked": (
        "all masked, per_token",
        "all masked, per_token per micro-batch",
        "all masked, mean",
        "all masked, per_sample",
        "in_place, all masked",
        "head, all masked",
        "linear, all masked",
    ),
    "`in_place`": ("in_place, per_token", "in_place, mean"),
    "`ResponseOnlyHead`": ("head, per_token", "head, mean"),
    "`LinearHead`": (
        "linear, per_token",
        "linear, mean",
        "linear, grad_in_forward",
        "linear, gathered logits",
    ),
    "`fused_cross_entropy`": (
        "trainer's loss_func",
        "trainer's loss_func, head",
        "trainer's loss_func, linear",
    ),
    "bf16": ("per_token, bf16", "mean, bf16", "in_place, bf16", "linear, bf16"),
}


def versions():
    """The versions of megatron-core that have a folder in build/megatron, oldest first."""
    found = [path.name for path in INSTALLED.glob("*") if (path / "megatron").is_dir()]
    return sorted(found, key=lambda name: [int(part) for part in name.split(".")])


def environment(version):
    """The environment of a fresh process: this megatron-core, and the code of this checkout."""
    return {**os.environ, "PYTHONPATH": str(INSTALLED / version), "OMP_NUM_THREADS": "1"}


def measure():
    """The imported megatron-core: version, errors {layout: {case: error}}, peaks {way: logits}."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/support"), str(Path(__file__).parent)]
    import megatron_peaks
    import megatron_runs as runs
    import test_megatron_exactness as exactness
    from megatron.core import __version__

    from bench.megatron_cpu import run_ranks

    unsharded = run_ranks(1, runs.reference)[0]
    errors = {}
    for layout, (processes, sizes) in exactness.LAYOUTS.items():
        cases = exactness.CASES
        ranks = run_ranks(processes, runs.train, unsharded["weights"], [*cases.values()], **sizes)
        errors[layout] = {
            name: exactness.largest_error(cases[name], results, unsharded)
            for name, results in zip(cases, zip(*ranks, strict=True), strict=True)
        }
    peaks = run_ranks(1, megatron_peaks.measure)[0]
    return {"version": __version__.partition("+")[0], "errors": errors, "peaks": peaks}


def matrix(records):
    """Markdown: the worst error of each family in each layout, over all versions."""
    lines = [["", *FAMILIES], ["---", *["---:"] * len(FAMILIES)]]
    for layout in records[0]["errors"]:
        worst = [
            max(record["errors"][layout][case] for record in records for case in cases)
            for cases in FAMILIES.values()
        ]
        lines.append([layout, *(f"{error:.0e}" if error else "0" for error in worst)])
    return table(lines)


def peaks(records):
    """Markdown: peak of the loss stage in logits, a column for each version."""
    lines = [["", *(record["version"] for record in records)], ["---", *["---:"] * len(records)]]
    for way in records[0]["peaks"]:
        lines.append([way, *(f"{record['peaks'][way]:.2f}" for record in records)])
    return table(lines)


def table(lines):
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def between(text, name):
    """(before, inside, after) the part between the comments that begin and end `name`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    inside, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"expected {begin!r} ... {end!r} in {PAGE}")
    return before + begin, inside.strip(), end + after


def main(names):
    records = []
    for version in names or versions():
        command = [sys.executable, "-W", "ignore", __file__, "--measure"]
        done = subprocess.run(command, env=environment(version), stdout=subprocess.PIPE, check=True)
        records.append(json.loads(done.stdout.splitlines()[-1]))
        if records[-1]["version"] != version:
            raise RuntimeError(f"expected megatron-core {version}, got {records[-1]['version']}")
        print(f"measured on megatron-core {version}")
    for name, text in (("matrix", matrix(records)), ("peaks", peaks(records))):
        before, _, after = between(PAGE.read_text(), name)
        PAGE.write_text(f"{before}{text}\n{after}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--measure"]:
        print(json.dumps(measure()))
    else:
        main(sys.argv[1:])

"""Tables and progress where rich is not installed, as in many images of a cluster."""

import subprocess
import sys

import pytest
from bench_processes import ROOT

from bench import terminal
from bench.__main__ import main
from bench.kernels import record

WITHOUT_RICH = "import sys; sys.modules['rich'] = None; from bench.__main__ import main; "


@pytest.mark.parametrize(
    ("command", "size"),
    [
        ("kernels", ["--shape", "1,16,512", "--provider", "ours-eager-new"]),
        pytest.param(
            *(
                "linear",
                ["--rows", "8", "--hidden", "16", "--vocab", "64", "--provider", "chunked"],
            ),
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_benchmark_needs_torch_alone(command, size, tmp_path):
    path = tmp_path / "record.json"
    arguments = [command, "--device", "cpu", *size, "--scored", "0.5", "--seconds", "0.01"]
    code = f"{WITHOUT_RICH}sys.exit(main({[*arguments, '--json', str(path)]!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = record.read(path)["rows"]
    lines = done.stdout.splitlines()
    assert sum(line.startswith("| ") and row["title"] in line for line in lines) == 1
    assert f"{row['ms']['p50']:.2f} (" in done.stdout and lines[-1] == f"written: {path}"


@pytest.mark.parametrize(
    ("command", "size", "names"),
    [
        ("kernels", ["--shape", "1,16,512"], ("ours-eager-new", "torch")),
        pytest.param(
            *("linear", ["--rows", "8", "--hidden", "16", "--vocab", "64"]),
            ("ours-linear", "chunked"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_benchmark_whose_time_is_over_times_what_it_has_checked(command, size, names, tmp_path):
    """Compiling the peers may take a whole part; the rows of ours were measured before."""
    path = tmp_path / "record.json"
    options = ["--provider", *names, "--scored", "1.0", "0.5", "--seconds", "0.01", "--stop", "0"]
    assert main([command, "--device", "cpu", *size, *options, "--json", str(path)]) == 0
    made = record.read(path)
    found = {(row["case"], row["provider"]): row for row in made["rows"]}
    assert set(found) == {(case, name) for case in (0, 1) for name in names}
    first = found.pop((0, names[0]))
    assert first["status"] == "ok" and first["ms"] and first["memory"]
    assert {row["status"] for row in found.values()} == {"pending"} and not made["finished"]


def test_progress_without_rich_is_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(terminal, "Table", None)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.progress(4) as shown:
        for text in ("a", "b", "c"):
            now[0] += 0.6 * terminal.EVERY_S
            shown.update(text, 1)
    assert capsys.readouterr().err == "2/4 b\n"

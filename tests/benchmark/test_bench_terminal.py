"""Tables and progress where rich is not installed, as in many images of a cluster."""

import subprocess
import sys

import pytest
from bench_processes import ROOT

from bench import terminal
from bench.kernels import record

WITHOUT_RICH = "import sys; sys.modules['rich'] = None; from bench.__main__ import main; "


@pytest.mark.parametrize(
    ("command", "size"),
    [
        ("kernels", ["--shape", "1,16,512", "--provider", "ours-eager-new"]),
        ("linear", ["--rows", "8", "--hidden", "16", "--vocab", "64", "--provider", "chunked"]),
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


def test_progress_without_rich_is_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(terminal, "Table", None)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.progress(4) as shown:
        for text in ("a", "b", "c"):
            now[0] += 0.6 * terminal.EVERY_S
            shown.update(text, 1)
    assert capsys.readouterr().err == "2/4 b\n"

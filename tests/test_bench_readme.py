"""The README's figures are those of the committed records, and a changed one is noticed."""

import warnings

import pytest

from bench.__main__ import main
from bench.kernels import plots, record
from bench.readme import BEGIN, END, ROOT, with_figures


@pytest.fixture
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_committed_figures_are_those_of_the_records(readme, capsys):
    assert main(["readme", "--check"]) == 0, capsys.readouterr().err
    assert with_figures(readme, ROOT / "bench/results") == readme


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench/results").glob("*.json")), ids=lambda path: path.stem
)
def test_the_plots_of_the_records_have_room_for_what_is_in_them(path, tmp_path):
    """Many providers or many models: matplotlib warns where it gives up."""
    measured = record.read(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.draw(measured, tmp_path / "plot.svg")
    providers = {row["title"] for row in measured["rows"] if row["ms"]}
    drawn = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert all(drawn.count(f">{title}<") == 2 for title in providers)  # a bar, the legend


def test_a_figure_that_was_changed_by_hand_is_noticed(readme, tmp_path, capsys):
    before, figures = readme.split(BEGIN)
    digit = next(at for at, letter in enumerate(figures) if letter.isdigit())
    other = str((int(figures[digit]) + 1) % 10)
    changed = tmp_path / "README.md"
    changed.write_text(before + BEGIN + figures[:digit] + other + figures[digit + 1 :])
    assert main(["readme", "--check", "--readme", str(changed)]) == 1
    assert "write them with: python -m bench readme" in capsys.readouterr().err
    assert main(["readme", "--readme", str(changed)]) == 0
    assert changed.read_text(encoding="utf-8") == readme


def test_a_readme_without_markers_is_refused(tmp_path, capsys):
    path = tmp_path / "README.md"
    path.write_text(f"nothing {END}")
    assert main(["readme", "--readme", str(path)]) == 1
    assert "expected the markers" in capsys.readouterr().err


def test_the_committed_record_has_what_the_readme_speaks_of():
    data = record.read(ROOT / "bench/results/cpu.json")
    assert data["finished"]
    cases = data["cases"]
    assert {case["model"] for case in cases} == {
        "llama3-8b",
        "qwen2.5",
        "gemma2",
        "mistral-nemo",
        "gpt2",
    }
    assert {case["scored"] for case in cases} == {1.0, 0.7, 0.5, 0.3, 0.1}
    assert {(case["tp"], case["nproc"]) for case in cases} == {(1, 1), (2, 2)}
    assert len(cases) == 50
    for row in data["rows"]:
        assert row["status"] in ("ok", "unavailable") or not row["provider"].startswith("ours-")

"""The generated parts of README and docs/ match their sources, and a manual change is detected."""

import shutil
import subprocess
import sys
import warnings
from itertools import combinations

import matplotlib.pyplot as plt
import pytest

from bench.__main__ import main
from bench.agreement import picture
from bench.errors import UserError
from bench.kernels import plots, record
from bench.pages import api, gain, records
from bench.readme import ROOT, markers, pages, read_long_runs, read_records, with_blocks

RECORDS = read_records(ROOT / "bench/results")
LONG_RUNS = read_long_runs(ROOT / "bench/results")


@pytest.fixture
def copy(tmp_path):
    """A copy of README.md and docs/ that a test may change."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def check(root):
    return main(["readme", "--check", "--root", str(root)])


def test_the_committed_pages_are_those_of_their_sources(capsys):
    assert main(["readme", "--check"]) == 0, capsys.readouterr().err


def test_no_library_for_tables_in_a_terminal_is_needed(copy):
    code = "import sys; sys.modules['rich'] = None; from bench.__main__ import main; "
    code += f"sys.exit(main(['readme', '--check', '--root', {str(copy)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page, block",
    [
        ("README.md", "gain"),
        ("docs/benchmarks.md", "cpu"),
        ("docs/benchmarks.md", "agreement"),
        ("docs/index.md", "options"),
        ("docs/api.md", "api"),
    ],
)
def test_a_generated_part_that_was_changed_by_hand_is_noticed(page, block, copy, capsys):
    path = copy / page
    before = path.read_text(encoding="utf-8")
    begin, _ = markers(block)
    head, inside = before.split(begin)
    at = next(at for at, letter in enumerate(inside) if letter.isalpha() and at > 100)
    path.write_text(head + begin + inside[:at] + "_" + inside[at + 1 :], encoding="utf-8")
    assert check(copy) == 1
    assert page in (told := capsys.readouterr().err)
    assert "write them with: python -m bench readme" in told
    assert main(["readme", "--root", str(copy)]) == 0
    assert path.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    "name, measured, draw",
    [
        pytest.param("cpu.png", RECORDS["cpu"], plots.draw, marks=pytest.mark.long),
        ("agreement-cpu.png", LONG_RUNS["cpu"], picture.draw),
    ],
    ids=["losses", "long run"],
)
def test_a_picture_of_an_older_record_is_noticed(name, measured, draw, copy, capsys):
    path = copy / "docs/img" / name
    draw({**measured, "finished": None}, path)
    assert check(copy) == 1
    assert name in capsys.readouterr().err
    assert main(["readme", "--root", str(copy)]) == 0
    assert plots.source_of(path) == plots.digest(measured)
    assert check(copy) == 0


def test_a_page_without_markers_is_refused(copy, capsys):
    (copy / "README.md").write_text("no markers\n\n| option | meaning |\n|---|---|\n\n")
    assert check(copy) == 1
    assert "expected the markers" in capsys.readouterr().err


def test_a_record_of_another_gpu_gets_a_section_and_leaves_the_readme(copy, tmp_path, capsys):
    """`python -m bench gpu` on a new chip writes a record that no page has a place for."""
    results = tmp_path / "results"
    results.mkdir()
    data = record.read(ROOT / "bench/results/nvidia-h100-80gb-hbm3.json")
    data["machine"]["device"] = "1 x AMD Instinct MI300X"
    for row in data["rows"]:
        row["provider"] = row["provider"].replace("-cuda-", "-hip-")
    record.write(data, results / "amd-instinct-mi300x.json")
    before = {name: (copy / name).read_text() for name in ("README.md", "docs/benchmarks.md")}
    assert main(["readme", "--root", str(copy), "--results", str(results)]) == 0
    assert (copy / "README.md").read_text() == before["README.md"]
    page = (copy / "docs/benchmarks.md").read_text()
    begin, end = markers("amd-instinct-mi300x")
    section = page[page.index("## 1 x AMD Instinct MI300X") : page.index(end)]
    assert begin in section and "llama3-8b, TP 1" in section
    assert page.replace(section + end + "\n\n", "") == before["docs/benchmarks.md"]
    assert (copy / "docs/img/amd-instinct-mi300x.png").exists()
    again = ["readme", "--check", "--root", str(copy), "--results", str(results)]
    assert main(again) == 0, capsys.readouterr().err


def _cut(data):
    """An interrupted run: one case was measured, and no memory."""
    for row in data["rows"]:
        row["memory"] = row["forward_x_logits"] = row["full_x_logits"] = None
        if row["case"] not in (None, 0):
            row |= {"status": "pending", "ms": None, "check": None, "speedup": None}
    for case in data["cases"][1:]:
        case["roof"] = None
    data["finished"] = False
    return data


def test_the_page_of_an_interrupted_run_can_be_written():
    data = _cut(record.read(ROOT / "bench/results/nvidia-h100-80gb-hbm3.json"))
    page = records.section(data, "x")
    assert "No memory was measured." in page and "| 100% scored |" in page
    for row in data["rows"]:
        if row["provider"].startswith("ours-"):
            row["ms"] = None
    assert "None of ours was timed." in records.section(data, "x")


def test_a_page_of_shards_alone_can_be_written():
    data = record.read(ROOT / "bench/results/nvidia-h100-80gb-hbm3.json")
    for case in data["cases"]:
        case["tp"] = 8
    assert "| ours (cuda), in place | yes |" in records.section(data, "x")


def test_the_readme_s_table_leaves_out_what_was_not_installed():
    data = record.read(ROOT / "bench/results/nvidia-h100-80gb-hbm3.json")
    data["rows"] = [row for row in data["rows"] if row["provider"] != "liger"]
    text = gain.gain(data)
    assert "Liger" not in text and "(written by hand / Megatron)" in text
    with pytest.raises(UserError, match="no time or no memory"):
        gain.gain(_cut(data))


def test_the_readme_is_read_in_two_minutes():
    """At most 150 lines; the first table has the figures of the record."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    before, _, rest = text.partition(markers("gain")[0])
    assert len(before.splitlines()) < 10  # a short description comes before the table
    rows = RECORDS["nvidia-h100-80gb-hbm3"]["rows"]
    cases = RECORDS["nvidia-h100-80gb-hbm3"]["cases"]
    for row in rows:
        if row["provider"] == "ours-cuda-inplace" and cases[row["case"]]["model"] == "mistral-nemo":
            assert f"| {row['ms']['p50']:.2f} |" in rest


@pytest.mark.parametrize("name", RECORDS)
def test_the_plots_have_room_for_what_is_in_them(name):
    """matplotlib warns if labels do not fit; no label overlaps another."""
    measured = RECORDS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plots.compose(measured)
        figure.canvas.draw()
    shown = {label.get_text() for label in figure.axes[0].get_yticklabels()}
    cases = measured["cases"]
    wanted = {
        row["title"]
        for row in measured["rows"]
        if row["ms"] and cases[row["case"]]["model"] == plots.SHOWN
    }
    assert shown == wanted
    for axes in figure.axes[2:]:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) > 3
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2)), axes.get_title()
        top, bottom = axes.bbox.y1 + 5, axes.bbox.y0 - 5
        assert all(bottom < box.y0 and box.y1 < top for box in boxes), axes.get_title()
    plt.close(figure)


def test_ours_are_told_from_others_by_color():
    ours = {
        plots.color(name) for name in ("ours-cuda-inplace", "ours-triton-new", "ours-eager-new")
    }
    others = {plots.color(name) for name in ("reference", "liger", "megatron-fused")}
    blue = [int(tint[5:], 16) - int(tint[1:3], 16) for tint in ours]
    assert len(ours) == 3 and min(blue) > 50
    assert all(tint[1:3] == tint[3:5] == tint[5:] for tint in others)


def test_bars_of_time_are_sorted():
    figure = plots.compose(RECORDS["cpu"])
    widths = [bar.get_width() for bars in figure.axes[0].containers[::2] for bar in bars]
    assert widths == sorted(widths, reverse=True) and len(widths) > 8
    assert "log scale" in figure.axes[0].get_xlabel()
    plt.close(figure)


def test_every_generated_block_has_its_markers_once():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page, blocks in pages(RECORDS, LONG_RUNS, readme).items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert with_blocks(text, blocks, page) == text


def test_the_api_page_has_every_public_name_and_argument():
    import fused_sft_loss
    import fused_sft_loss.megatron

    text = api.blocks(ROOT)["api"]
    for module in (fused_sft_loss, fused_sft_loss.megatron):
        assert all(f"### `{name}`" in text for name in module.__all__)
    options = fused_sft_loss.sft_loss.__kwdefaults__
    assert all(f"- `{name}" in text or f"`, `{name}`" in text for name in options)


def test_the_api_page_spells_constants_and_aliases_out(tmp_path):
    (tmp_path / "names.py").write_text("INDEX = -100\nPair = tuple[int, int]\n")
    calls = "def call(given: Pair, index=INDEX) -> Pair: ...\n"
    calls += "@contextmanager\ndef inside(*, size=None) -> Iterator[Pair]: ..."
    (tmp_path / "calls.py").write_text(calls)
    shown = {
        name: api.signature(name, node).splitlines()[1]
        for name, (node, _) in api.definitions(tmp_path).items()
    }
    assert shown == {
        "call": "call(given: tuple[int, int], index=-100) -> tuple[int, int]",
        "inside": "inside(*, size=None) -> ContextManager[tuple[int, int]]",
    }


def test_the_committed_record_has_what_the_pages_speak_of():
    data = record.read(ROOT / "bench/results/cpu.json")
    assert data["finished"]
    cases = data["cases"]
    models = {"llama3-8b", "qwen2.5", "gemma2", "mistral-nemo", "gpt2"}
    assert {case["model"] for case in cases} == models
    assert {case["scored"] for case in cases} == {1.0, 0.7, 0.5, 0.3, 0.1}
    assert {(case["tp"], case["nproc"]) for case in cases} == {(1, 1), (2, 2)}
    assert len(cases) == 50
    for row in data["rows"]:
        assert row["status"] in ("ok", "unavailable") or not row["provider"].startswith("ours-")


def test_the_committed_long_run_is_as_near_to_fp32_as_the_reference():
    run = LONG_RUNS["cpu"]
    assert len(run["losses"]["fp32"]) == 200 and run["losses"]["fp32"][-1] < 8
    assert run["too_far"] == [] and max(_rms(run, "ours"), _rms(run, "linear")) < run["allowed_rms"]


def _rms(run, name):
    return run["from_fp32"][name]["rms"]

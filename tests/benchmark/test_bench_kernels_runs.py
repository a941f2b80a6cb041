"""Whole runs of `python -m bench kernels`: their records, failures and errors."""

import csv
import json
import statistics
import sys
import time

import bench_providers as made
import pytest
from bench_processes import interrupted, new_mark, start
from bench_providers import case_of

from bench.__main__ import main
from bench.errors import UserError
from bench.kernels import cases, command, record, timing
from bench.kernels.cases import MODELS
from bench.kernels.measuring import Measuring
from bench.kernels.providers import PROVIDERS
from bench.ranks import RankError


def measured(providers, cases_, **options):
    """Measure in real processes; returns the rows."""
    rows = record.Rows(cases_, "full")
    for index in range(len(cases_)):
        for provider in providers:
            rows.add(index, provider, None)
    run = Measuring(providers, rows, "cpu", 1, lambda now=False: None, lambda *a: None)
    run.times(0.0)
    run.memory()
    return rows.rows


def test_a_process_that_is_killed_costs_its_row_alone():
    providers = list(map(made.provider, (made.right, made.killed, made.copying)))
    rows = measured(providers, [case_of(), case_of(scored=0.1)])
    for index in range(2):
        assert rows[index, "killed"]["status"] == "OOM"
        assert rows[index, "right"]["status"] == rows[index, "copying"]["status"] == "ok"
        assert rows[index, "copying"]["memory"]["forward"] > case_of().logits_bytes


@pytest.mark.parametrize("at", [(0, "logits"), (0, "timing"), None])
def test_a_process_that_dies_between_rows_does_not_start_for_ever(monkeypatch, at):
    starts = []

    def dies(nproc, fn, work, *args, on_message, **options):
        starts.append(len(work))
        if at:
            on_message(0, {"at": at})
        raise RankError("rank 0:\ndied with exit code -9")

    monkeypatch.setattr("bench.kernels.measuring.run_ranks", dies)
    if at is None:
        with pytest.raises(UserError, match="exit code -9"):
            measured([made.provider(made.right)], [case_of()])
    else:
        rows = measured([made.provider(made.right)], [case_of()])
        assert rows[0, "right"]["status"] == "OOM"
    assert starts == [1]


@pytest.mark.parametrize("device, groups", [("cpu", 2), ("cuda", 1)])
def test_memory_is_recorded_in_one_process_on_a_gpu(monkeypatch, device, groups):
    """Starting CUDA twenty times takes longer than to record the memory of twenty losses."""
    started, rows = [], record.Rows([case_of()], "full")
    providers = [made.provider(made.right), made.provider(made.copying)]

    def finishes(nproc, fn, work, *args, on_message, **options):
        started.append([provider.name for _, _, chosen in work for provider in chosen])
        for name in started[-1]:
            on_message(0, {"of": (0, name), "memory": {"forward": 0, "full": 0}})

    monkeypatch.setattr("bench.kernels.measuring.run_ranks", finishes)
    for provider in providers:
        rows.add(0, provider, None)
        rows.tell(0, provider.name, {"seconds": [(1.0, 1.0)]})
    Measuring(providers, rows, device, 1, lambda now=False: None, lambda *a: None).memory()
    assert len(started) == groups and sum(started, []) == ["right", "copying"]


def test_a_sharded_vocabulary_over_two_processes():
    """The vocabulary is padded, so the last shard ends in padding columns. Every provider is
    checked against the softmax over both shards."""
    model = cases.Model("odd", 1003, 1003)
    case = case_of(model, tp=2, nproc=2)
    assert case.columns * 2 > case.vocab == case.vocab_size
    names = ("ours-cpu-inplace", "ours-eager-new", "reference", "torch", "megatron")
    rows = measured([PROVIDERS[name] for name in names], [case])
    for name in names:
        row = rows[0, name]
        assert row["status"] == "ok", row["reason"]
        assert row["check"]["ok"] and len(row["seconds"]) == timing.SHARDED and row["memory"]


def test_predicted_memory_is_what_is_measured():
    case = case_of(cases.Model("even", 4096, 4096), seq=128)
    names = ("ours-cpu-inplace", "ours-cpu-new", "reference", "torch", "megatron")
    rows = measured([PROVIDERS[name] for name in names], [case])
    for name in names:
        usage = rows[0, name]["memory"]
        assert usage, rows[0, name]["reason"]
        for key, predicted in zip(
            ("forward", "full"), PROVIDERS[name].predicted_bytes(case), strict=True
        ):
            assert usage[key] == pytest.approx(predicted, abs=0.05 * case.logits_bytes), name


ROW = {"case", "provider", "title", "mode", "status", "reason", "check", "memory"}
ROW |= {*record.TIMED, "forward_x_logits", "full_x_logits"}
CHECK = {"loss_error", "gradient_error", "loss_tolerance", "gradient_tolerance"}
CHECK |= {"unscored_is_zero", "ok"}
MACHINE = {"command", "date", "commit", "device", "clocks_mhz", "processor", "cores", "versions"}
MACHINE |= {"load_average", "threads", "last_level_cache_bytes"}


def test_the_record(tmp_path, capsys):
    paths = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "png")}
    shape = ["--shape", "2,64,4096", "--scored", "1", "0.5", "--seconds", "0"]
    wanted = ["--provider", "ours-cpu", "reference", "liger"]
    out = ["--json", str(paths["json"]), "--csv", str(paths["csv"]), "--plot", str(paths["png"])]
    assert main(["kernels", *shape, *wanted, *out]) == 0
    printed = capsys.readouterr().out
    assert "ours (cpu), in place" in printed and "\x1b" not in printed  # no colours in a pipe
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    data = record.read(paths["json"])
    assert data["finished"] and data["schema"] == record.SCHEMA
    assert data["machine"].keys() >= MACHINE and data["settings"]["seed"] == 0
    assert [case["scored_rows"] for case in data["cases"]] == [2 * 63, 2 * 32]
    reference = {r["case"]: r for r in data["rows"] if r["provider"] == "reference"}
    for row in data["rows"]:
        assert row.keys() == ROW and row["status"] in record.STATUSES
        if row["status"] == "unavailable":
            assert row["reason"] and not row["ms"] and not row["memory"] and row["case"] is None
            continue
        case = data["cases"][row["case"]]
        assert row["status"] == "ok" and row["check"].keys() == CHECK and row["check"]["ok"]
        ms, roof = row["ms"], case["roof"]
        assert ms["p50"] == pytest.approx(statistics.median(row["samples_ms"]), abs=1e-3)
        assert ms["p20"] <= ms["p50"] <= ms["p80"] and len(row["samples_ms"]) >= timing.FEWEST
        assert row["tokens_per_s"] == pytest.approx(case["rows"] / ms["p50"] * 1e3)
        per_element = 6 * case["scored_rows"] + 2 * (case["rows"] - case["scored_rows"])
        moved = per_element * case["columns"]
        assert row["gb_per_s"] == pytest.approx(moved / ms["p50"] / 1e6)
        assert row["speedup"] == pytest.approx(reference[row["case"]]["ms"]["p50"] / ms["p50"])
        assert row["full_x_logits"] == row["memory"]["full"] / case["logits_bytes"]
        zeroed = 2 * (case["rows"] - case["scored_rows"]) * case["columns"]
        seconds = (moved - zeroed) / roof["copy_gb_per_s"] + zeroed / roof["zero_gb_per_s"]
        assert row["of_roof"] == pytest.approx(seconds / 1e6 / ms["p50"])
    liger = [row for row in data["rows"] if row["provider"] == "liger"]
    assert [row["status"] for row in liger] == ["unavailable"]
    with open(paths["csv"], newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(data["rows"])
    assert [float(line["ms_p50"] or 0) for line in lines] == [
        row["ms"]["p50"] if row["ms"] else 0 for row in data["rows"]
    ]
    _compare(data, paths["json"])


def _compare(data, path):
    slower = json.loads(json.dumps(data))
    for row in slower["rows"]:
        if row["ms"]:
            row["ms"]["p50"] *= 1.5
    record.compare(slower, record.read(path))
    changes = [row["change"] for row in slower["rows"] if row["ms"]]
    assert changes and changes == pytest.approx([0.5] * len(changes))


@pytest.mark.long
def test_an_interrupted_run_leaves_the_finished_rows(tmp_path):
    mark, path = new_mark(), tmp_path / "out.json"
    many = ["--shape", "2,64,4096", "--scored", "1", *[f"0.{n}" for n in range(1, 10)]]
    quick = ["--provider", "ours-cpu", "--seconds", "1", "--json", str(path)]
    process = start("kernels", *many, *quick, mark=mark)
    deadline = time.monotonic() + 120
    while not path.exists() or not _timed(path):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    errors = interrupted(process, mark)
    assert "Traceback" not in errors and errors.rstrip().endswith("bench: interrupted")
    data = record.read(path)
    assert not data["finished"]
    assert 0 < len(_timed(path)) < len(data["rows"])
    assert {row["status"] for row in data["rows"]} >= {"ok", "pending"}


def _timed(path):
    return [row for row in json.loads(path.read_text() or '{"rows": []}')["rows"] if row["ms"]]


def test_wrong_use_is_one_line_and_says_what_is_right(tmp_path, capsys):
    (tmp_path / "file").write_text("{}")
    wrong = {
        "--provider: expected one of ours-cpu-inplace": ["--provider", "luger"],
        "did you mean liger?": ["--provider", "luger"],
        "--model: expected some of llama3-8b, qwen2.5": ["--model", "llama4"],
        "--tp: expected some of (1, 2, 4, 8), got 3": ["--tp", "3"],
        "--scored: expected parts above 0": ["--scored", "1.5"],
        "--shape: expected three positive numbers": ["--shape", "2,8"],
        "--plot: expected a name in .svg or .png": ["--plot", str(tmp_path / "x.gif")],
        "expected a record with schema 1": ["--compare", str(tmp_path / "file")],
        "cannot write ": ["--json", str(tmp_path / "file" / "x.json")],
    }
    for message, arguments in wrong.items():
        assert main(["kernels", *arguments]) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("bench: ") and errors.count("\n") == 1 and message in errors


def test_a_missing_library_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["kernels", "--plot", "out.png"]) == 1
    errors = capsys.readouterr().err
    assert "matplotlib" in errors and 'pip install "fused_sft_loss[bench]"' in errors


def test_too_little_memory_names_the_largest_size(monkeypatch, capsys):
    monkeypatch.setattr(command.machine, "free_memory", lambda: 2**30)
    arguments = ["kernels", "--provider", "reference", "--dry-run", "--shape"]
    assert main([*arguments, "2,4096,131072"]) == 1
    errors = capsys.readouterr().err
    largest = errors.split("the largest that fits is --shape ")[1].strip()
    assert main([*arguments, largest]) == 0
    batch, seq, vocab = largest.split(",")
    assert main([*arguments, f"{batch},{int(seq) + 1},{vocab}"]) == 1
    capsys.readouterr()
    assert main(["kernels", "--provider", "reference", "--dry-run"]) == 0  # sized to fit
    assert "PREDICTED" in capsys.readouterr().out
    monkeypatch.setattr(command.machine, "free_memory", lambda: 2**20)
    assert main(["kernels", "--dry-run"]) == 1
    assert "MiB free" in capsys.readouterr().err


def test_the_list_says_why_a_provider_cannot_run(capsys):
    assert main(["kernels", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*PROVIDERS, *MODELS))
    assert "runs on GPUs" in printed

"""Small runs of `python -m bench sft` from end to end, and their errors."""

import json
import sys
import time

import pytest
import torch
from bench_processes import alive, interrupted, new_mark, start

from bench.__main__ import main
from bench.ranks import run_ranks
from bench.sft import command, report, train
from bench.sft.shapes import Shape
from bench.sft.tokenizer import Batch
from bench.sft.train import Settings

SMALL = "--seq-length 32 --micro-batch-size 2 --layers 1 --hidden 64".split()


@pytest.fixture
def chat(tmp_path):
    turns = [("user", "Count."), ("assistant", "one two three four five six")] * 2
    messages = [{"role": role, "content": content} for role, content in turns]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    return path


def finished(folder, *arguments, size=SMALL, launcher=()):
    """Run `python -m bench sft` to its end; returns the record and the printed text."""
    words = ["sft", *arguments, "--steps", "3", "--out", str(folder), *size]
    process = start(*words, launcher=launcher)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert (folder / "result.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "result.json").read_text()), output


def multiples(record, name):
    """The memory of a run, in multiples of one rank's logits."""
    logits = record["logits_of_a_rank"]["bytes"]
    used = record["runs"][name]["memory_bytes"]
    return {kind: used[kind] / logits for kind in ("forward_peak", "held", "backward_peak")}


@pytest.mark.long
def test_all_losses_train_alike(tmp_path):
    record, output = finished(tmp_path / "made" / "out")
    reference, ours, linear = (record["losses"][name] for name in ("reference", "ours", "linear"))
    assert "loss per step" in output and f"{ours[2]:.5f}" in output
    assert len(reference) == len(ours) == len(linear) == 3
    assert ours[0] == pytest.approx(reference[0], rel=1e-6)
    assert linear[0] == pytest.approx(reference[0], rel=1e-5)  # its logits may not be rounded
    for others in (ours, linear):
        assert others == pytest.approx(reference, rel=1e-3)
    assert record["data"]["vocabulary"] == 131072
    assert 0 < record["tokens_scored"] < record["tokens"] <= 3 * 64
    logits = record["logits_of_a_rank"]
    assert logits["shape"] == [2, 32, 131072] and logits["dtype"] == "bfloat16"
    part = 31 / 32  # share of the positions left after shifting
    used = multiples(record, "reference")
    assert used["forward_peak"] == pytest.approx((1 + 2 + 2) * part, rel=0.01)  # shift, fp32, log
    assert used["held"] == pytest.approx(2 * part, rel=0.01)
    assert max(multiples(record, "ours").values()) < 0.01
    assert all(run["head_ms"] > 0 for run in record["runs"].values())
    assert record["runs"]["ours"]["stage_ms"] > 0 and record["runs"]["linear"]["stage_ms"] is None


@pytest.mark.long
def test_a_run_without_logits_holds_none(tmp_path):
    record, _ = finished(tmp_path, "--loss", "ours", "linear")
    size, memory = record["logits_of_a_rank"]["bytes"], {}
    for name in ("ours", "linear"):
        memory[name] = record["runs"][name]["memory_bytes"]
    weight = 2 * 131072 * 64  # its gradient, bf16
    assert memory["ours"]["head_held"] >= size
    assert memory["linear"]["head_held"] < 2**16
    assert memory["ours"]["head_peak"] >= size + weight
    assert weight <= memory["linear"]["head_peak"] < memory["ours"]["head_peak"]


@pytest.mark.long
def test_only_the_run_without_logits(tmp_path):
    record, output = finished(tmp_path, "--loss", "linear")
    assert record["logits_of_a_rank"] is None and list(record["losses"]) == ["linear"]
    assert "loss stage" not in output and "output layer and loss" in output


@pytest.mark.long
def test_both_losses_train_alike_on_a_sharded_vocabulary(tmp_path, chat):
    record, _ = finished(tmp_path, "--tp", "2", "--data", str(chat), "--no-inplace")
    reference, ours = record["losses"]["reference"], record["losses"]["ours"]
    assert ours[0] == pytest.approx(reference[0], rel=1e-6)
    assert ours == pytest.approx(reference, rel=1e-3)
    assert record["logits_of_a_rank"]["shape"] == [2, 32, 131072 // 2]
    assert multiples(record, "reference")["forward_peak"] > 2 * 5 * 31 / 32  # and Megatron's gather
    used = multiples(record, "ours")
    assert used["backward_peak"] == pytest.approx(1, abs=0.01)  # the gradient
    assert used["forward_peak"] < 0.01 and used["held"] < 0.01


@pytest.mark.long
def test_torchrun_starts_the_processes_of_a_real_shape(tmp_path, chat):
    """Tensor parallelism of two, no data parallelism; gpt2's shape with one layer."""
    arguments = ("--model", "gpt2", "--tp", "2", "--data", str(chat))
    size = "--seq-length 32 --layers 1".split()
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    record, output = finished(tmp_path, *arguments, size=size, launcher=torchrun)
    assert output.count("loss per step") == 1  # one process reports
    settings = record["settings"]
    assert (settings["tp"], settings["dp"], settings["hidden"]) == (2, 1, 768)
    assert record["logits_of_a_rank"]["shape"] == [2, 32, 50432 // 2]
    reference, ours = record["losses"]["reference"], record["losses"]["ours"]
    assert ours[0] == pytest.approx(reference[0], rel=1e-5)
    for name, run in record["runs"].items():
        assert run["tokens_per_s"] == pytest.approx(2 * 32 / run["step_ms"] * 1e3)
        assert run["memory_bytes"]["step_peak"] >= run["memory_bytes"]["head_peak"]
        if name != "linear":  # which has no loss stage of its own
            assert 0 < run["loss_share"] < 1
            assert run["memory_bytes"]["step_peak"] >= run["memory_bytes"]["backward_peak"]


def test_data_parallel_ranks_train_as_one_process_on_all_their_batches(capsys):
    """The ranks have equally many scored tokens, so the mean of their means is the mean of all."""
    rows = [_row(seed) for seed in (1, 2)]
    whole = Batch(*(torch.cat(parts) for parts in zip(*rows, strict=True)), 32)
    apart = [Batch(*row, 16) for row in rows]
    losses = []
    for dp, step in ((1, [whole]), (2, apart)):
        settings = Settings(**vars(SMALL_SHAPE), **OURS_ALONE, dp=dp)
        ranks = run_ranks(dp, train.run, settings, [step] * 3, on_message=lambda *told: None)
        record = report.build(ranks, [step] * 3, settings, {"source": "two rows"}, [])
        report.show(record)
        assert "reference" not in capsys.readouterr().out
        assert set(record["losses"]) == set(record["runs"]) == {"ours"}
        assert record["first_difference"] is None and report.verdict(record) == 0
        assert record["tokens_per_step"] == [32] * 3 and record["positions"] == 96
        losses.append(record["losses"]["ours"])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)  # gradients are rounded to bf16
    assert losses[0][2] < 0.9 * losses[0][0]


SMALL_SHAPE = Shape(1, 64, 256, 2, 2, 32, gated=False)
OURS_ALONE = {"losses": ("ours",), "device": "cpu", "tp": 1, "vocab": 512, "seq_length": 16}
OURS_ALONE |= {"learning_rate": 0.01, "warmup": 1, "inplace": True, "seed": 0, "threads": 1}


def _row(seed):
    """(tokens, loss_mask) [1, 16]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 512, (1, 16), generator=generator), (torch.arange(16)[None] > 7).float()


@pytest.mark.long
def test_interrupt_is_one_line_and_leaves_nobody_behind(tmp_path, chat):
    mark = new_mark()
    options = ("--tp", "2", "--steps", "5000", "--data", str(chat), "--out", str(tmp_path))
    process = start("sft", *options, *SMALL, mark=mark)
    deadline = time.monotonic() + 240
    while len(alive(mark)) < 4:  # the command, two ranks and the server that forks them
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    errors = interrupted(process, mark)
    assert "Traceback" not in errors and errors.rstrip().endswith("bench: interrupted")
    assert json.loads((tmp_path / "result.json").read_text())["finished"] is False


def test_an_interrupted_run_keeps_the_losses_of_its_steps(tmp_path, monkeypatch, capfd):
    """`python -m bench gpu` interrupts a run that reaches its limit."""

    def interrupted_at_the_second_step(settings, batches, kept):
        losses = {name: 10.0 for name in settings.losses}
        for message in ({"rehearsed": "ours"}, {"step": 0, "losses": losses}):
            kept.add(message)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_load", lambda args, dp: ([], {"vocabulary": 512}))
    monkeypatch.setattr(command, "_train", interrupted_at_the_second_step)
    assert main(["sft", "--device", "cpu", "--out", str(tmp_path)]) == 130
    assert capfd.readouterr().err == "bench: interrupted\n"
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["finished"] is False and record["settings"]["vocab"] == 512
    assert record["losses"] == {"reference": [10.0], "ours": [10.0], "linear": [10.0]}


def blocked(tmp_path):
    """A path below a file, which no user can write, whatever the rights."""
    (tmp_path / "file").write_text("")
    return str(tmp_path / "file" / "out")


def test_wrong_use_is_one_line(tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("nonsense\n")
    out = ["--out", str(tmp_path / "out")]
    cases = {
        "cannot read --data": ["sft", *out, "--data", str(tmp_path / "missing.jsonl")],
        f"{bad}:1: expected a JSON object": ["sft", *out, "--data", str(bad)],
        "cannot write in": ["sft", "--out", blocked(tmp_path)],
        "--hidden: expected a multiple of 64": ["sft", *out, "--tp", "2", "--hidden", "96"],
        "--tp: expected 1, 2, 4 or 8": ["sft", *out, "--tp", "3"],
        "--hidden: expected none with --model": ["sft", "--model", "gpt2", "--hidden", "64"],
        "--tp: expected a divisor of qwen2.5's 4 key": ["sft", "--model", "qwen2.5", "--tp", "8"],
    }
    for message, arguments in cases.items():
        assert main(arguments) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("bench: ") and errors.count("\n") == 1 and message in errors


def test_a_missing_library_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["sft", "--out", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert "matplotlib" in errors and 'pip install "fused_sft_loss[bench]"' in errors


def test_losses_that_disagree_fail_the_command(capsys):
    from bench.sft.report import verdict

    def record(first, second):
        losses = {"reference": [10.0, 8.0], "ours": [10.0 + first, 8.0 + second]}
        return {"losses": losses, "first_difference": abs(first)}

    assert verdict(record(1e-5, 1e-2)) == 0
    assert verdict(record(1e-3, 0.0)) == 1
    assert verdict(record(0.0, 0.5)) == 1
    assert capsys.readouterr().err.count("\n") == 2

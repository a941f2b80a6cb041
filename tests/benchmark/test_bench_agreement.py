"""`python -m bench agreement`: the runs, the distance between them, and the verdict."""

import json
import math

import pytest
import torch
from bench_processes import start

from bench.agreement import distance, picture
from bench.agreement.report import Report
from bench.kernels import plots
from bench.sft.losses import EVERY_TITLE
from bench.sft.tokenizer import Batch

FP32 = [3.0, 2.0, 1.0]


def losses(**runs):
    """Losses of all runs: as in fp32, but 0.01 higher in the two bf16 runs of the reference."""
    near = [loss + 0.01 for loss in FP32]
    return {"fp32": FP32, "reversed": near, "reference": near, "ours": FP32, "linear": FP32} | runs


def test_the_distance_of_two_runs():
    found = distance.between([1.0, 2.0, 3.0], [1.0, 2.3, 2.6])
    assert found.rms == pytest.approx(math.sqrt((0.09 + 0.16) / 3))
    assert found.largest == pytest.approx(0.4)
    assert found.at_first == 0


@pytest.mark.parametrize(
    "ours, far",
    [
        ([3.0, 2.0, 1.0], False),
        ([3.0149, 1.9851, 1.0149], False),  # 1.49 times as far as the reference in bf16
        ([3.0151, 1.9849, 1.0151], True),
        ([3.0, 2.0, 1.5], True),
        ([3.0, math.nan, 1.0], True),
    ],
)
def test_a_run_may_be_as_far_from_fp32_as_bf16_makes_it(ours, far, capsys):
    found = distance.from_fp32(losses(ours=ours))
    assert distance.too_far(found) == (["ours"] if far else [])
    record = {
        "too_far": distance.too_far(found),
        "allowed_rms": distance.allowed(found),
        "from_fp32": {name: vars(one) for name, one in found.items()},
    }
    assert Report().verdict(record) == int(far)
    assert ("'ours'" in capsys.readouterr().err) == far


def test_rows_in_reverse_order_keep_their_masks():
    tokens, mask = torch.arange(6).view(2, 3), torch.tensor([[0.0, 1, 1], [0, 0, 1]])
    batch = Batch(tokens, mask, 6).reversed()
    assert batch.tokens.tolist() == [[3, 4, 5], [0, 1, 2]]
    assert batch.loss_mask.tolist() == [[0, 0, 1], [0, 1, 1]]
    assert (batch.used, batch.scored) == (6, 3)


def test_the_mean_of_the_last_steps():
    values = [float(n) for n in range(20)]
    means = picture.smoothed(values)
    assert len(means) == 20 and means[:3] == [0, 0.5, 1]
    assert means[19] == sum(values[10:]) / 10


@pytest.mark.long
def test_all_runs_train_from_the_same_weights(tmp_path):
    out, results = tmp_path / "out", tmp_path / "results"
    size = "--steps 4 --seq-length 32 --layers 1 --hidden 64".split()
    process = start("agreement", *size, "--out", str(out), "--results", str(results))
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    record = json.loads((out / "result.json").read_text())
    assert json.loads((results / "agreement/cpu.json").read_text()) == record
    assert list(record["losses"]) == list(EVERY_TITLE)
    for name, run in record["losses"].items():
        assert len(run) == 4 and run[0] == pytest.approx(record["losses"]["fp32"][0], rel=1e-4)
        assert run[3] < run[0]
        assert name == "fp32" or 0 < record["from_fp32"][name]["rms"] < 1e-2
    assert "rms to fp32" in output
    assert plots.source_of(out / "result.png") == plots.digest(record)

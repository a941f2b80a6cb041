"""The demo's tables: in every ratio, larger is better."""

import pytest
from rich.console import Console

from bench.sft import report
from bench.sft.losses import TITLES, disagreement


def run(factor, logits=True):
    """The summary of a run, `factor` times better than that of factor 1.

    logits: its model returns logits, so it has a loss stage
    """
    of_loss = ("forward_ms", "backward_ms", "stage_ms", "loss_share")
    of_head = ("head_forward_ms", "head_backward_ms", "head_ms", "step_ms")
    peaks = [*report.HEAD_PEAKS, *(report.PEAKS if logits else ())]
    return {
        **dict.fromkeys(of_head, 10 / factor),
        **dict.fromkeys(of_loss, 10 / factor if logits else None),
        "tokens_per_s": 100 * factor,
        "memory_bytes": {key: 2**20 / factor for key in peaks},
    }


def record(**runs):
    return {"runs": runs, "logits_of_a_rank": {"bytes": 2**20}}


@pytest.mark.parametrize("factor, told", [(4, "4.0x"), (0.25, "0.25x"), (1, "1.0x")])
def test_every_ratio_of_the_demo_is_above_1_where_ours_is_better(factor, told):
    three = record(reference=run(1), ours=run(factor), linear=run(2 * factor, logits=False))
    twice = {"4.0x": "8.0x", "0.25x": "0.50x", "1.0x": "2.0x"}[told]
    loss, head = report._loss_stage(three), report._head_stage(three)
    ratios = list(loss.columns[-1].cells)
    assert ratios == [told] * len(ratios) and len(ratios) == 4 + len(report.PEAKS)
    assert loss.columns[-1].header == report.BETTER.format("ours")
    for column, expected in zip(head.columns[-2:], (told, twice), strict=True):
        ratios = list(column.cells)
        assert ratios == [expected] * len(ratios) and len(ratios) == 5 + len(report.HEAD_PEAKS)
    assert head.columns[-1].header == report.BETTER.format(TITLES["linear"])


def test_a_run_without_logits_is_in_the_table_of_the_output_layer_only():
    two = record(reference=run(1), linear=run(2, logits=False))
    assert [column.header for column in report._loss_stage(two).columns] == ["", "reference"]
    headers = [column.header for column in report._head_stage(two).columns]
    assert headers[:3] == ["", "reference", TITLES["linear"]]


def test_a_single_run_is_compared_with_nothing():
    console = Console(width=100)
    with console.capture() as shown:
        console.print(report._loss_stage(record(ours=run(1))))
        console.print(report._head_stage(record(ours=run(1))))
    assert "better" not in shown.get() and "tokens/s" in shown.get()


def test_the_difference_of_a_step_is_the_largest_of_all_runs():
    losses = {"reference": [2.0, 4.0], "ours": [2.5, 4.0], "linear": [2.0, 3.0]}
    assert report._differences(losses) == [0.5, 1.0]
    disagreeing = {"losses": losses, "first_difference": 0.5}
    assert report.verdict(disagreeing) == 1


def test_nothing_kept_is_not_divided_by():
    assert report.better(5, 0, False) == ""


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_loss_that_is_not_a_number_disagrees(at):
    """max keeps whatever came before a NaN."""
    steps = [10.0, 8.0, 7.0]
    bad = [float("nan") if step == at else loss for step, loss in enumerate(steps)]
    for losses in ({"reference": steps, "ours": bad}, {"reference": bad, "ours": steps}):
        assert "disagree" in disagreement({**losses, "linear": steps})
    assert disagreement({"reference": steps, "ours": steps}) is None
    assert disagreement({"reference": [], "ours": []}) is None

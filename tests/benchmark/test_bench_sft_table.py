"""The demo's table: in every ratio, larger is better."""

import pytest
from rich.console import Console

from bench.sft import report


def run(factor):
    """The summary of a run, `factor` times better than that of factor 1."""
    times = ("forward_ms", "backward_ms", "stage_ms", "step_ms", "loss_share")
    memory = {key: 2**20 / factor for key in report.PEAKS}
    return {
        **dict.fromkeys(times, 10 / factor),
        "tokens_per_s": 100 * factor,
        "memory_bytes": memory,
    }


@pytest.mark.parametrize("factor, told", [(4, "4.0x"), (0.25, "0.25x"), (1, "1.0x")])
def test_every_ratio_of_the_demo_is_above_1_where_ours_is_better(factor, told):
    table = report._stage(
        {"runs": {"reference": run(1), "ours": run(factor)}, "logits_of_a_rank": {"bytes": 2**20}}
    )
    ratios = list(table.columns[-1].cells)
    assert ratios == [told] * len(ratios) and len(ratios) == 6 + len(report.PEAKS)
    assert table.columns[-1].header == report.BETTER


def test_a_single_run_is_compared_with_nothing():
    table = report._stage({"runs": {"ours": run(1)}, "logits_of_a_rank": {"bytes": 2**20}})
    console = Console(width=100)
    with console.capture() as shown:
        console.print(table)
    assert report.BETTER not in shown.get() and "tokens/s" in shown.get()


def test_nothing_kept_is_not_divided_by():
    assert report.better(5, 0, False) == ""

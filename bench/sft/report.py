"""The record of a run: its table, JSON and picture."""

import json
import statistics
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from .. import machine

MIB = 2**20
SAME_WEIGHTS = 1e-5  # relative: step 1 has the same logits, so only fp32 rounding may differ
SAME_RUN = 1e-2  # relative: later steps differ by what bf16 rounding of gradients makes of that


class Progress:
    """Shows the steps as the first rank tells of them; use `update` as run_ranks' on_message."""

    def __init__(self, steps):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bars = Bars(*columns, TimeElapsedColumn(), console=Console(stderr=True))
        self._task = self._bars.add_task("starting", total=steps)

    def __enter__(self):
        self._bars.start()
        return self

    def __exit__(self, *exc):
        self._bars.stop()

    def update(self, rank, message):
        if "rehearsed" in message:
            text = f"memory of the {message['rehearsed']} loss recorded"
            self._bars.update(self._task, description=text)
        else:
            text = "loss {reference:.4f} reference, {ours:.4f} ours".format(**message)
            self._bars.update(self._task, description=text, completed=message["step"] + 1)


def build(ranks, batches, settings, data, argv):
    """The JSON-able record; of times and bytes the rank that took most, step by step."""
    names = ("reference", "ours")
    for name in names:
        if any(rank[name]["losses"] != ranks[0][name]["losses"] for rank in ranks):
            losses = [rank[name]["losses"] for rank in ranks]
            raise RuntimeError(f"expected every rank to report the same {name} loss, got {losses}")
    losses = {name: ranks[0][name]["losses"] for name in names}
    differences = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
    return {
        "machine": machine.describe("sft", argv),
        "settings": vars(settings),
        "data": data,
        "logits_of_a_rank": ranks[0]["ours"]["logits"],
        "tokens": sum(batch.used for batch in batches),
        "tokens_scored": sum(batch.scored for batch in batches),
        "tokens_scored_per_step": [batch.scored for batch in batches],
        "tokens_per_step": [batch.used for batch in batches],
        "positions": sum(batch.tokens.numel() for batch in batches),
        "losses": losses,
        "largest_difference": max(differences),
        "first_difference": differences[0],
        "runs": {name: _summary([rank[name] for rank in ranks]) for name in names},
    }


def _summary(ranks):
    stage = [rank["stage_seconds"] for rank in ranks]
    forward = [max(step[0] for step in steps) for steps in zip(*stage, strict=True)]
    backward = [max(step[1] for step in steps) for steps in zip(*stage, strict=True)]
    steps = [max(seconds) for seconds in zip(*(r["step_seconds"] for r in ranks), strict=True)]
    memory = [rank["memory"] for rank in ranks]
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    return {
        "forward_ms": statistics.median(forward) * 1e3,
        "backward_ms": statistics.median(backward) * 1e3,
        "stage_ms": statistics.median(both) * 1e3,
        "step_ms": statistics.median(steps) * 1e3,
        "stage_ms_samples": [seconds * 1e3 for seconds in both],
        "memory_bytes": {
            key: None if memory[0][key] is None else max(usage[key] for usage in memory)
            for key in memory[0]
        },
    }


def show(record):
    console = Console(width=None if Console().is_terminal else 100)
    settings, logits = record["settings"], record["logits_of_a_rank"]
    console.print(
        "\nGPTModel {layers} x {hidden}, vocabulary {vocab}, TP {tp}, bf16".format(**settings)
        + "; a rank's logits {shape} {dtype}, {mib:.0f} MiB; ".format(
            **logits, mib=logits["bytes"] / MIB
        )
        + f"{record['data']['source']}"
    )
    console.print(_losses(record))
    console.print(_stage(record))
    scored, used = record["tokens_scored"], record["tokens"]
    console.print(
        f"tokens scored {scored} of {used} ({scored / used:.0%}), in {record['positions']} "
        f"positions with padding; largest difference of the losses "
        f"{record['largest_difference']:.1e}, at step 1 (same weights) "
        f"{record['first_difference']:.1e}. Later steps add what training makes of gradients "
        "rounded to bf16"
    )


def _losses(record):
    table = Table(title="loss per step")
    for name in ("step", "tokens scored / tokens", "reference", "ours", "difference"):
        table.add_column(name, justify="right")
    columns = (record["tokens_scored_per_step"], record["tokens_per_step"])
    for number, (scored, used, reference, ours) in enumerate(
        zip(*columns, *record["losses"].values(), strict=True), 1
    ):
        cells = f"{reference:.5f}", f"{ours:.5f}", f"{abs(ours - reference):.1e}"
        table.add_row(str(number), f"{scored} / {used}", *cells)
    return table


def _stage(record):
    table = Table(title="the loss stage of a micro-batch: time (median), memory beyond the logits")
    for name in ("", "reference", "ours", "reference / ours"):
        table.add_column(name, justify="left" if not name else "right")
    reference, ours = record["runs"]["reference"], record["runs"]["ours"]
    times = {"forward": "forward_ms", "backward": "backward_ms", "both": "stage_ms"}
    for label, key in {**times, "whole training step": "step_ms"}.items():
        a, b = reference[key], ours[key]
        table.add_row(f"{label}, ms", f"{a:.1f}", f"{b:.1f}", f"{a / b:.1f}x")
    logits = record["logits_of_a_rank"]["bytes"]
    labels = {
        "forward_peak": "peak forward",
        "held": "held between",
        "backward_peak": "peak backward",
    }
    for key, label in labels.items():
        a, b = (run["memory_bytes"][key] for run in (reference, ours))
        ratio = f"{a / b:,.0f}x" if b else ""
        cells = (f"{n / MIB:.2f} ({n / logits:.4f} x logits)" for n in (a, b))
        table.add_row(f"{label}, MiB", *cells, ratio)
    return table


def write(record, folder):
    """result.json and result.png in `folder`."""
    console = Console()
    (folder / "result.json").write_text(json.dumps(record, indent=1) + "\n")
    _picture(record, folder / "result.png")
    console.print(f"written: {folder / 'result.json'} and {folder / 'result.png'}")


def _picture(record, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curve, clock, memory) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    steps = range(1, len(record["losses"]["ours"]) + 1)
    curve.plot(steps, record["losses"]["reference"], lw=5, alpha=0.4, label="reference")
    curve.plot(steps, record["losses"]["ours"], lw=1.5, label="ours")
    curve.set(title="loss", xlabel="step", ylabel="mean loss of the scored tokens")
    curve.legend()
    runs = record["runs"]
    bars = [[run["forward_ms"], run["backward_ms"]] for run in runs.values()]
    _bars(clock, bars, "time of the loss stage", "ms, median", "{:.1f}")
    kinds = ("forward_peak", "backward_peak")
    bars = [[run["memory_bytes"][kind] / MIB for kind in kinds] for run in runs.values()]
    _bars(memory, bars, "peak memory of the loss stage", "MiB beyond the logits", "{:.2f}")
    settings = "TP {tp}, vocabulary {vocab}, sequence {seq_length}".format(**record["settings"])
    figure.suptitle(f"{settings}, {record['machine']['processor']}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(axes, values, title, unit, form):
    """Two groups, forward and backward; `values` are (forward, backward) of reference and ours."""
    names = ("reference", "ours")
    for offset, name, pair in zip((-0.2, 0.2), names, values, strict=True):
        drawn = axes.bar([offset, 1 + offset], pair, width=0.38, label=name)
        axes.bar_label(drawn, [form.format(value) for value in pair], fontsize=8)
    axes.set_xticks([0, 1], ["forward", "backward"])
    axes.set(title=title, ylabel=unit)
    axes.legend()


def verdict(record):
    """Exit status: 1, with the reason, where the runs differ by more than rounding explains."""
    worst = max(abs(a - b) / abs(a) for a, b in zip(*record["losses"].values(), strict=True))
    first = record["first_difference"] / abs(record["losses"]["reference"][0])
    if first <= SAME_WEIGHTS and worst <= SAME_RUN:
        return 0
    print(
        f"bench: the losses disagree: expected a relative difference of at most {SAME_WEIGHTS:g} "
        f"at step 1 and {SAME_RUN:g} later, got {first:.1e} and {worst:.1e}",
        file=sys.stderr,
    )
    return 1

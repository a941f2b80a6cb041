"""The record of a run: tables, JSON and picture."""

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
SAME_RUN = 1e-2  # relative: later, gradients rounded to bf16 make the weights differ


class Progress:
    """A progress bar of the steps. The first rank reports each step to `update`."""

    def __init__(self, steps):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bars = Bars(*columns, TimeElapsedColumn(), console=Console(stderr=True))
        self._task = self._bars.add_task("starting", total=steps)

    def __enter__(self):
        self._bars.start()
        return self

    def __exit__(self, *exc):
        self._bars.stop()

    def update(self, message):
        if "rehearsed" in message:
            text = f"memory of the {message['rehearsed']} loss recorded"
            self._bars.update(self._task, description=text)
        else:
            losses = message["losses"].items()
            text = "loss " + ", ".join(f"{loss:.4f} {name}" for name, loss in losses)
            self._bars.update(self._task, description=text, completed=message["step"] + 1)


def build(ranks, batches, settings, data, argv):
    """The record, ready for JSON.

    Each time is the longest of all ranks in its step, each number of bytes the largest of all.

    batches  batches[step][data-parallel rank]
    """
    names = settings.losses
    for name in names:
        if any(rank[name]["losses"] != ranks[0][name]["losses"] for rank in ranks):
            losses = [rank[name]["losses"] for rank in ranks]
            raise RuntimeError(f"expected every rank to report the same {name} loss, got {losses}")
    losses = {name: ranks[0][name]["losses"] for name in names}
    differences = [abs(a - b) for a, b in zip(*losses.values(), strict=True)] if names[1:] else None
    scored = [sum(batch.scored for batch in step) for step in batches]
    used = [sum(batch.used for batch in step) for step in batches]
    positions = sum(batch.tokens.numel() for batch in batches[0])  # of a step
    return {
        "machine": machine.describe("sft", argv, settings.device),
        "settings": vars(settings),
        "data": data,
        "logits_of_a_rank": ranks[0][names[0]]["logits"],
        "tokens": sum(used),
        "tokens_scored": sum(scored),
        "tokens_scored_per_step": scored,
        "tokens_per_step": used,
        "positions": positions * len(batches),
        "losses": losses,
        "largest_difference": differences and max(differences),
        "first_difference": differences and differences[0],
        "runs": {name: _summary([rank[name] for rank in ranks], positions) for name in names},
    }


def _summary(ranks, positions):
    stage = [rank["stage_seconds"] for rank in ranks]
    forward = [max(step[0] for step in steps) for steps in zip(*stage, strict=True)]
    backward = [max(step[1] for step in steps) for steps in zip(*stage, strict=True)]
    steps = [max(seconds) for seconds in zip(*(r["step_seconds"] for r in ranks), strict=True)]
    memory = [rank["memory"] for rank in ranks]
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    step = statistics.median(steps)
    return {
        "tokens_per_s": positions / step,
        "loss_share": statistics.median(both) / step,
        "forward_ms": statistics.median(forward) * 1e3,
        "backward_ms": statistics.median(backward) * 1e3,
        "stage_ms": statistics.median(both) * 1e3,
        "step_ms": step * 1e3,
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
        "\nGPTModel {layers} x {hidden}, vocabulary {vocab}, TP {tp}, DP {dp}, bf16".format(
            **settings
        )
        + "; a rank's logits {shape} {dtype}, {mib:.0f} MiB; ".format(
            **logits, mib=logits["bytes"] / MIB
        )
        + f"{record['machine']['device']}; {record['data']['source']}"
    )
    console.print(_losses(record))
    console.print(_stage(record))
    scored, used = record["tokens_scored"], record["tokens"]
    console.print(
        f"{scored} of {used} tokens were scored ({scored / used:.0%}). tokens/s counts all "
        f"{record['positions']} positions, padding included."
    )
    if record["first_difference"] is not None:
        console.print(
            f"The losses differ by {record['first_difference']:.1e} at step 1, where the weights "
            f"are the same, and by at most {record['largest_difference']:.1e} later, because "
            "gradients are rounded to bf16."
        )


def _losses(record):
    names = tuple(record["losses"])
    table = Table(title="loss per step")
    for name in ("step", "tokens scored / tokens", *names, *(("difference",) if names[1:] else ())):
        table.add_column(name, justify="right")
    columns = (record["tokens_scored_per_step"], record["tokens_per_step"])
    for number, (scored, used, *losses) in enumerate(
        zip(*columns, *record["losses"].values(), strict=True), 1
    ):
        cells = [f"{loss:.5f}" for loss in losses]
        cells += [f"{abs(losses[1] - losses[0]):.1e}"] if names[1:] else []
        table.add_row(str(number), f"{scored} / {used}", *cells)
    return table


BETTER = "ours is better by"  # a factor; below 1 ours is worse


def _stage(record):
    runs, logits = record["runs"], record["logits_of_a_rank"]["bytes"]
    table = Table(title="loss stage of one micro-batch: median time, and memory beyond the logits")
    for name in ("", *runs, *((BETTER,) if len(runs) > 1 else ())):
        table.add_column(name, justify="left" if not name else "right")

    def add(label, values, form, more_is_better=False):
        compared = [better(*values, more_is_better)] if values[1:] else []
        table.add_row(label, *(form(value) for value in values), *compared)

    def in_logits(value):
        return f"{value / MIB:.2f} ({value / logits:.4f} x logits)"

    times = {"forward, ms": "forward_ms", "backward, ms": "backward_ms", "both, ms": "stage_ms"}
    for label, key in {**times, "whole training step, ms": "step_ms"}.items():
        add(label, [run[key] for run in runs.values()], "{:.1f}".format)
    add("loss share of a step", [r["loss_share"] for r in runs.values()], "{:.1%}".format)
    add("tokens/s", [r["tokens_per_s"] for r in runs.values()], "{:,.0f}".format, True)
    for key, label in PEAKS.items():
        add(f"{label}, MiB", [run["memory_bytes"][key] for run in runs.values()], in_logits)
    return table


def better(reference, ours, more_is_better):
    """How many times better ours is. Above 1 it is better, for times, bytes and rates alike."""
    over, under = (ours, reference) if more_is_better else (reference, ours)
    if not under:
        return ""
    times = over / under
    return f"{times:,.0f}x" if times >= 100 else f"{times:.1f}x" if times >= 1 else f"{times:.2f}x"


PEAKS = {
    "forward_peak": "peak in forward",
    "held": "kept for backward",
    "backward_peak": "peak in backward",
    "step_peak": "peak of the step",
}


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
    steps = range(1, len(record["tokens_per_step"]) + 1)
    for name, style in STYLES.items():
        if name in record["losses"]:
            curve.plot(steps, record["losses"][name], label=name, **style)
    curve.set(title="loss", xlabel="step", ylabel="mean loss of the scored tokens")
    curve.legend()
    runs = record["runs"]
    bars = [[run["forward_ms"], run["backward_ms"]] for run in runs.values()]
    _bars(clock, runs, bars, "time of the loss stage", "ms, median", "{:.1f}")
    kinds = ("forward_peak", "backward_peak")
    bars = [[run["memory_bytes"][kind] / MIB for kind in kinds] for run in runs.values()]
    _bars(memory, runs, bars, "peak memory of the loss stage", "MiB beyond the logits", "{:.2f}")
    settings = "TP {tp}, vocabulary {vocab}, sequence {seq_length}".format(**record["settings"])
    figure.suptitle(f"{settings}, {record['machine']['processor']}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


STYLES = {
    "reference": {"lw": 5, "alpha": 0.4, "color": "#404040"},
    "ours": {"lw": 1.5, "color": "#0b3c8c"},
}


def _bars(axes, names, values, title, unit, form):
    """Draw a group of bars for forward and one for backward.

    `values` are the (forward, backward) of each name.
    """
    offsets = (-0.2, 0.2) if len(values) > 1 else (0.0,)
    for offset, name, pair in zip(offsets, names, values, strict=True):
        tint = STYLES[name]["color"]
        drawn = axes.bar([offset, 1 + offset], pair, width=0.38, color=tint)
        axes.bar_label(drawn, [f"{name}\n{form.format(value)}" for value in pair], fontsize=8)
    axes.set_xticks([0, 1], ["forward", "backward"])
    axes.set(title=title, ylabel=unit)
    axes.margins(y=0.15)


def verdict(record):
    """Exit status: 1, with the reason, if the runs differ by more than rounding explains."""
    if record["first_difference"] is None:
        return 0
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

"""The record of a run: tables, JSON and picture."""

import json
import statistics
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from .. import machine
from . import picture
from .losses import EVERY_TITLE, TITLES, disagreement

MIB = 2**20


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
            text = f"memory of the loss recorded: {EVERY_TITLE[message['rehearsed']]}"
            self._bars.update(self._task, description=text)
        else:
            losses = message["losses"].items()
            text = "loss " + ", ".join(f"{loss:.4f} {EVERY_TITLE[name]}" for name, loss in losses)
            self._bars.update(self._task, description=text, completed=message["step"] + 1)


def build(ranks, batches, settings, data, argv):
    """The record, ready for JSON.

    Each time is the longest of all ranks in its step, each number of bytes the largest of all.

    batches  batches[step][data-parallel rank]
    """
    names = settings.losses
    losses = losses_of(ranks, names)
    differences = _differences(losses) if names[1:] else None
    logits = (ranks[0][name]["logits"] for name in names)
    scored = [sum(batch.scored for batch in step) for step in batches]
    used = [sum(batch.used for batch in step) for step in batches]
    positions = sum(batch.tokens.numel() for batch in batches[0])  # of a step
    return {
        "finished": True,
        "machine": machine.describe("sft", argv, settings.device),
        "settings": vars(settings),
        "data": data,
        "logits_of_a_rank": next(filter(None, logits), None),
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


def losses_of(ranks, names):
    """{run: its loss in each step}, the same on all ranks."""
    for name in names:
        if any(rank[name]["losses"] != ranks[0][name]["losses"] for rank in ranks):
            losses = [rank[name]["losses"] for rank in ranks]
            raise RuntimeError(f"expected every rank to report the same {name} loss, got {losses}")
    return {name: ranks[0][name]["losses"] for name in names}


def _differences(losses):
    """In each step the largest difference of a run's loss from that of the first run."""
    first, *others = losses.values()
    return [max(abs(other[n] - loss) for other in others) for n, loss in enumerate(first)]


def _summary(ranks, positions):
    steps = [max(seconds) for seconds in zip(*(r["step_seconds"] for r in ranks), strict=True)]
    memory, step = [rank["memory"] for rank in ranks], statistics.median(steps)
    loss = _times([rank["stage_seconds"] for rank in ranks])
    head = _times([rank["head_seconds"] for rank in ranks])
    return {
        "tokens_per_s": positions / step,
        "loss_share": loss["both_ms"] and loss["both_ms"] / 1e3 / step,
        "forward_ms": loss["forward_ms"],
        "backward_ms": loss["backward_ms"],
        "stage_ms": loss["both_ms"],
        "head_forward_ms": head["forward_ms"],
        "head_backward_ms": head["backward_ms"],
        "head_ms": head["both_ms"],
        "step_ms": step * 1e3,
        "stage_ms_samples": loss["samples_ms"],
        "head_ms_samples": head["samples_ms"],
        "memory_bytes": {
            key: None if memory[0][key] is None else max(usage[key] for usage in memory)
            for key in memory[0]
        },
    }


def _times(ranks):
    """Medians of a stage, from [(forward, backward)] of each rank: the slowest in each step.

    None if the run has no such stage.
    """
    parts = [[max(part) for part in zip(*step, strict=True)] for step in zip(*ranks, strict=True)]
    if not parts:
        return dict.fromkeys(("forward_ms", "backward_ms", "both_ms", "samples_ms"))
    samples = [sum(part) * 1e3 for part in parts]
    forward, backward = (statistics.median(kind) * 1e3 for kind in zip(*parts, strict=True))
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "both_ms": statistics.median(samples),
        "samples_ms": samples,
    }


def show(record):
    console = Console(width=None if Console().is_terminal else 100)
    settings, logits = record["settings"], record["logits_of_a_rank"]
    size = "\nGPTModel {layers} x {hidden}, vocabulary {vocab}, TP {tp}, DP {dp}, bf16; "
    if logits:
        size += f"a rank's logits {logits['shape']} {logits['dtype']}, "
        size += f"{logits['bytes'] / MIB:.0f} MiB; "
    console.print(
        size.format(**settings) + f"{record['machine']['device']}; {record['data']['source']}"
    )
    console.print(_losses(record))
    if logits:
        console.print(_loss_stage(record))
    console.print(_head_stage(record))
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
    titles = [TITLES[name] for name in names]
    for name in ("step", "scored / tokens", *titles, *(("difference",) if names[1:] else ())):
        table.add_column(name, justify="right")
    counts = zip(record["tokens_scored_per_step"], record["tokens_per_step"], strict=True)
    differences = _differences(record["losses"]) if names[1:] else None
    for number, (scored, used) in enumerate(counts):
        cells = [f"{record['losses'][name][number]:.5f}" for name in names]
        cells += [f"{differences[number]:.1e}"] if differences else []
        table.add_row(str(number + 1), f"{scored} / {used}", *cells)
    return table


BETTER = "{} is better by"  # a factor; below 1 it is worse


def _loss_stage(record):
    """The loss alone, of the runs whose model returns logits."""
    runs = {name: run for name, run in record["runs"].items() if run["stage_ms"] is not None}
    logits = record["logits_of_a_rank"]["bytes"]
    table = _Compared("loss stage of one micro-batch: median time, memory beyond the logits", runs)

    def in_logits(value):
        return f"{value / MIB:.2f} ({value / logits:.4f} x logits)"

    times = {"forward, ms": "forward_ms", "backward, ms": "backward_ms", "both, ms": "stage_ms"}
    for label, key in times.items():
        table.add(label, lambda run, key=key: run[key], "{:.1f}".format)
    table.add("share of a step", lambda run: run["loss_share"], "{:.1%}".format)
    for key, label in PEAKS.items():
        table.add(f"{label}, MiB", lambda run, key=key: run["memory_bytes"][key], in_logits)
    return table.table


def _head_stage(record):
    """The output layer with its loss, and the whole step, of all runs."""
    table = _Compared(
        "output layer and loss of one micro-batch, and the whole training step", record["runs"]
    )
    times = {
        "forward, ms": "head_forward_ms",
        "backward, ms": "head_backward_ms",
        "both, ms": "head_ms",
        "whole training step, ms": "step_ms",
    }
    for label, key in times.items():
        table.add(label, lambda run, key=key: run[key], "{:.1f}".format)
    table.add("tokens/s", lambda run: run["tokens_per_s"], "{:,.0f}".format, True)
    for key, label in HEAD_PEAKS.items():
        table.add(
            f"{label}, MiB", lambda run, key=key: run["memory_bytes"][key] / MIB, "{:.2f}".format
        )
    return table.table


class _Compared:
    """A table with a column for each run, and one for what each is better by than the first."""

    def __init__(self, title, runs):
        self.runs, self.table = runs, Table(title=title)
        self.table.add_column("")
        for name in runs:
            self.table.add_column(TITLES[name], justify="right")
        for name in list(runs)[1:]:
            self.table.add_column(BETTER.format(TITLES[name]), justify="right")

    def add(self, label, value_of, form, more_is_better=False):
        first, *others = values = [value_of(run) for run in self.runs.values()]
        compared = [better(first, other, more_is_better) for other in others]
        self.table.add_row(label, *(form(value) for value in values), *compared)


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
}
HEAD_PEAKS = {
    "head_peak": "peak beyond the hidden states",
    "head_held": "kept for backward",
    "step_peak": "peak of the step",
}


def write(record, folder):
    """result.json and result.png in `folder`."""
    console = Console()
    (folder / "result.json").write_text(json.dumps(record, indent=1) + "\n")
    picture.draw(record, folder / "result.png")
    console.print(f"written: {folder / 'result.json'} and {folder / 'result.png'}")


def verdict(record):
    """Exit status: 1, with the reason, if the runs differ by more than rounding explains."""
    if reason := disagreement(record["losses"]):
        print(f"bench: {reason}", file=sys.stderr)
    return int(reason is not None)

"""The record of the long runs: table, JSON and picture."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import machine
from ..errors import writable_file, writable_folder
from ..kernels.command import device_slug
from ..sft import report as sft
from ..sft.losses import EVERY_TITLE, IN_FP32
from . import FOLDER, distance, picture


class Report:
    """What `bench.sft.command.train_and_report` does with the runs.

    results: None, or the folder that gets a copy of the record
    """

    def __init__(self, results=None):
        self.results = results and Path(results)

    def build(self, ranks, batches, settings, data, argv):
        """The record, ready for JSON."""
        losses = sft.losses_of(ranks, settings.losses)
        distances = distance.from_fp32(losses)
        return {
            "machine": machine.describe("agreement", argv, settings.device),
            "settings": vars(settings),
            "data": data,
            "tokens_scored": sum(batch.scored for step in batches for batch in step),
            "losses": {name: [round(loss, 6) for loss in run] for name, run in losses.items()},
            "from_fp32": {name: asdict(found) for name, found in distances.items()},
            "from_reference": {
                name: asdict(distance.between(run, losses["reference"]))
                for name, run in losses.items()
                if name not in (IN_FP32, "reference")
            },
            "allowed_rms": distance.allowed(distances),
            "too_far": distance.too_far(distances),
        }

    def show(self, record):
        console = Console(width=None if Console().is_terminal else 100)
        console.print(_table(record))
        first, last = (record["losses"][IN_FP32][at] for at in (0, -1))
        console.print(
            f"{len(record['losses'][IN_FP32])} steps, {record['tokens_scored']} scored tokens; the "
            f"loss of the fp32 run fell from {first:.3f} to {last:.3f}."
        )

    def write(self, record, folder):
        """result.json and result.png in `folder`, and the record in `results`."""
        text = json.dumps(record, indent=1) + "\n"
        paths = [folder / "result.json"]
        if self.results:
            inside = writable_folder(writable_folder(self.results) / FOLDER)
            slug = device_slug(record["settings"]["device"])
            paths.append(writable_file(inside / f"{slug}.json"))
        for path in paths:
            path.write_text(text)
        picture.draw(record, folder / "result.png")
        Console().print("written:", *paths, folder / "result.png")

    def verdict(self, record):
        """Exit status: 1, with the reason, if a run is further from fp32 than bf16 explains."""
        if not record["too_far"]:
            return 0
        found = {name: record["from_fp32"][name]["rms"] for name in record["too_far"]}
        print(
            f"bench: expected losses within {record['allowed_rms']:.2e} (rms) of the fp32 run, "
            f"got {found}",
            file=sys.stderr,
        )
        return 1


def _table(record):
    table = Table(title="difference of the loss, over all steps")
    table.add_column("run in bf16")
    for head in distance.HEADS:
        table.add_column(head, justify="right")
    for name, cells in distance.rows(record):
        table.add_row(EVERY_TITLE[name], *cells)
    return table

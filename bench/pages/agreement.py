"""docs/benchmarks.md: the long runs."""

from ..agreement.report import FOLDER, HEADS, rows
from ..sft.losses import EVERY_TITLE, IN_FP32
from .markdown import table

PICTURE = "img/agreement.png"


def section(record):
    """The Markdown of a record of `bench agreement`."""
    return "\n\n".join([_what(record), _table(record), f"![Distance from fp32]({PICTURE})"])


def _table(record):
    lines = [[EVERY_TITLE[name], *cells] for name, cells in rows(record)]
    return table(("run in bf16", *HEADS), lines, left=1)


def _what(record):
    machine, settings, losses = record["machine"], record["settings"], record["losses"][IN_FP32]
    shape = f"GPTModel, {settings['layers']} layers of {settings['hidden']}"
    return "\n".join(
        [
            f"- Device: {machine['device']}, {machine['date'][:10]}, {machine['commit']}, "
            f"torch {machine['versions']['torch']}, megatron-core "
            f"{machine['versions']['megatron-core']}",
            f"- Model: {shape}, vocabulary {settings['vocab']}, from random weights",
            f"- Data: {record['data']['source']}; {record['data']['tokenizer']}",
            f"- {len(losses)} steps, {record['tokens_scored']} scored tokens; the loss fell from "
            f"{losses[0]:.2f} to {losses[-1]:.2f}",
            f"- Command: `{machine['command']}`",
        ]
    )


def records_in(results):
    """Paths of the records in a folder of results."""
    return sorted((results / FOLDER).glob("*.json"))

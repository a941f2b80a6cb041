"""docs/benchmarks.md: the long runs."""

from ..agreement.distance import HEADS, rows
from ..sft.losses import EVERY_TITLE, IN_FP32
from .markdown import origin, table


def section(records):
    """The Markdown of records of `bench agreement`, {device: record}."""
    return "\n\n".join(_part(name, record) for name, record in records.items())


def picture(name):
    return f"img/agreement-{name}.png"


def _part(name, record):
    lines = [[EVERY_TITLE[run], *cells] for run, cells in rows(record)]
    return "\n\n".join(
        [
            _what(record),
            table(("run in bf16", *HEADS), lines, left=1),
            f"![Distance from fp32]({picture(name)})",
        ]
    )


def _what(record):
    machine, settings, losses = record["machine"], record["settings"], record["losses"][IN_FP32]
    return "\n".join(
        [
            f"- Device: {machine['device']}",
            *origin(machine),
            f"- Model: GPTModel, {settings['layers']} layers of {settings['hidden']}, vocabulary "
            f"{settings['vocab']}, from random weights",
            f"- Data: {record['data']['source']}; {record['data']['tokenizer']}",
            f"- {len(losses)} steps, {record['tokens_scored']} scored tokens; the loss of the fp32 "
            f"run fell from {losses[0]:.2f} to {losses[-1]:.2f}",
            f"- Command: `{machine['command']}`",
        ]
    )

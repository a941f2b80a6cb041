"""The picture of a record: time and memory as sorted bars, and time over the scored fraction.

Ours are blue, with one shade for the compiled backends, one for Triton and one for eager. All
others are grey. Names are written beside the bars and lines, so there is no legend.
"""

import hashlib
import io
import json
import math

import matplotlib
from PIL import Image, PngImagePlugin

matplotlib.use("Agg")
matplotlib.rcParams["svg.fonttype"] = "none"  # keep text as text: small files, readable diffs
matplotlib.rcParams["svg.hashsalt"] = "bench"  # the same record gives the same file

from matplotlib import pyplot as plt  # noqa: E402

from ..errors import UserError  # noqa: E402
from .record import device_and_threads  # noqa: E402

OURS = {"cpu": "#0b3c8c", "cuda": "#0b3c8c", "hip": "#0b3c8c", "triton": "#3f83d6"}
OURS_ELSE = "#9cc3ee"  # eager
REFERENCE, PEER = "#404040", "#a3a3a3"
LIGHT = 0.45  # opacity of the second bar of a pair
SHOWN = "mistral-nemo"  # the model of the bars, if it was measured
PART = 0.3  # the scored fraction of the second bar
COLUMNS = 3  # panels in a row
PANEL = 4.6, 2.9  # inches
BAR = 0.3  # inches for one provider
FONT = 8
MODES = {"fwd": "the loss", "bwd": "its gradient", "full": "the loss and its gradient"}
SOURCE = "record"  # key in a PNG: the digest of its record
LOG_AXIS = "log scale: equal distances are equal factors"


def draw(record, path):
    """Write the picture as SVG or PNG, by the suffix of `path`. UserError if nothing was timed."""
    save(compose(record), record, path)


def save(figure, record, path):
    """Write the figure of a record and close it. A PNG names its record; see `source_of`."""
    if path.suffix == ".svg":
        figure.savefig(path, metadata={"Date": None})
    else:
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=90)
        source = PngImagePlugin.PngInfo()
        source.add_text(SOURCE, digest(record))
        small = Image.open(drawn).convert("RGB").quantize(64)  # a third of the size
        small.save(path, optimize=True, pnginfo=source)
    plt.close(figure)


def digest(record):
    """A short hash of a record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def source_of(path):
    """The digest of the record that a PNG was drawn from, or None."""
    with Image.open(path) as picture:
        return picture.info.get(SOURCE)


def compose(record):
    """The figure of a record. UserError if nothing was timed."""
    groups = _groups(record)
    if not groups:
        raise UserError("there is nothing to draw: no provider was timed; see --list")
    name = next((name for name in groups if name.startswith(SHOWN)), next(iter(groups)))
    providers = len(_rows(record, groups[name]))
    lines = -(-len(groups) // COLUMNS)
    heights = max(PANEL[1], BAR * providers + 0.9), lines * PANEL[1]
    figure = plt.figure(figsize=(COLUMNS * PANEL[0], sum(heights) + 0.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    time, memory = above.subplots(1, 2, width_ratios=(3, 2))
    order = _bars_of_time(time, name, groups[name], record)
    _bars_of_memory(memory, groups[name][0], record, order)
    grid = below.add_gridspec(lines, COLUMNS)
    for place, (group, cases) in zip(grid, groups.items(), strict=False):
        _lines(below.add_subplot(place), group, cases, record)
    machine, mode = record["machine"], MODES[record["settings"]["mode"]]
    figure.suptitle(
        f"Masked next-token loss: {mode}. {device_and_threads(machine)}, {machine['date'][:10]}",
        fontsize=FONT + 3,
    )
    return figure


def color(provider):
    """The colour of a provider: blue for ours, grey for the others."""
    who, _, rest = provider.partition("-")
    if who == "ours":
        return OURS.get(rest.partition("-")[0], OURS_ELSE)
    return REFERENCE if provider == "reference" else PEER


def _groups(record):
    """{name: indices of timed cases that differ only in the scored fraction, largest first}."""
    groups, timed = {}, {row["case"] for row in record["rows"] if row["ms"]}
    for index, case in sorted(enumerate(record["cases"]), key=lambda pair: pair[1]["tp"]):
        if index not in timed:
            continue
        kind = "" if case["tp"] == 1 else f", TP {case['tp']}"
        kind += ", one shard" if case["tp"] > case["nproc"] else ""
        name = f"{case['model']}{kind}: {case['rows']} x {case['columns']} {case['dtype']}"
        groups.setdefault(name, []).append(index)
    return {
        name: sorted(found, key=lambda i: -record["cases"][i]["scored"])
        for name, found in groups.items()
    }


def _rows(record, indices):
    """{title: the timed rows of these cases, in the order of the cases}."""
    found = {}
    for index in indices:
        for row in record["rows"]:
            if row["case"] == index and row["ms"]:
                found.setdefault(row["title"], []).append(row)
    return found


def _bars_of_time(axes, name, indices, record):
    """Draw two bars for each provider, slowest at the bottom. Returns the titles in that order."""
    fractions = [record["cases"][index]["scored"] for index in indices]
    part = PART if PART in fractions else fractions[-1]
    pairs = {}
    for title, rows in _rows(record, indices).items():
        by = {record["cases"][row["case"]]["scored"]: row for row in rows}
        if fractions[0] in by:
            pairs[title] = by[fractions[0]], by.get(part)
    order = sorted(pairs, key=lambda title: -pairs[title][0]["ms"]["p50"])
    for place, title in enumerate(order):
        first, second = pairs[title]
        halves = [(first, 1.0)] if len(fractions) == 1 else [(first, 1.0), (second, LIGHT)]
        for half, (row, opacity) in enumerate(halves):
            if row is not None:
                at = place + (0.2 - 0.4 * half if len(halves) == 2 else 0)
                _bar(axes, at, row["ms"]["p50"], row["provider"], opacity, _ms(row["ms"]["p50"]))
    _roof(axes, [first for first, _ in pairs.values()], len(order))
    axes.set_xscale("log")
    axes.margins(x=0.12)
    _plain_ticks(axes.xaxis)
    axes.set_yticks(range(len(order)), order, fontsize=FONT)
    below = "" if len(fractions) == 1 else f" (light: {part:.0%} of the rows scored)"
    axes.set_title(f"time, {name}: shorter is better{below}", fontsize=FONT + 1)
    axes.set_xlabel(f"ms, {LOG_AXIS}", fontsize=FONT)
    return order


def _bar(axes, at, value, provider, opacity, text):
    drawn = axes.barh([at], [value], 0.38, color=color(provider), alpha=opacity)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
    axes.bar_label(drawn, [text], fontsize=FONT - 1, padding=2, bbox=behind)


def _roof(axes, rows, height):
    """Mark the time for two reads and one write, from the measured bandwidth of copy and zero."""
    known = [row["of_roof"] * row["ms"]["p50"] for row in rows if row["of_roof"]]
    if not known:
        return
    axes.axvline(known[0], color="#c04000", lw=1, ls=":")
    axes.annotate(
        f" two reads and one write at this machine's bandwidth: {_ms(known[0])} ms",
        (known[0], height - 0.45),
        fontsize=FONT - 1,
        color="#c04000",
        annotation_clip=False,
    )


def _bars_of_memory(axes, index, record, order):
    """Draw peaks as multiples of the logits, in the order of the bars of time."""
    rows = {row["title"]: row for row in record["rows"] if row["case"] == index and row["memory"]}
    for place, title in enumerate(order):
        for offset, key, opacity in ((0.2, "full_x_logits", 1), (-0.2, "forward_x_logits", LIGHT)):
            if title in rows:
                value = rows[title][key]
                _bar(axes, place + offset, value, rows[title]["provider"], opacity, f"{value:.2f}")
    axes.set_yticks(range(len(order)), [])
    axes.margins(x=0.15)
    axes.tick_params(labelsize=FONT)
    axes.set_title("peak memory beyond the logits (light: forward alone)", fontsize=FONT + 1)
    axes.set_xlabel("multiples of the logits", fontsize=FONT)


def _lines(axes, name, indices, record):
    """Draw time over the scored fraction: a line per provider, except eager and new gradients."""
    ends = []
    for title, rows in _rows(record, indices).items():
        provider = rows[0]["provider"]
        if "-eager-" in provider or title.endswith(", new gradient"):
            continue
        scored = [record["cases"][row["case"]]["scored"] * 100 for row in rows]
        ms = [row["ms"] for row in rows]
        style = {"color": color(provider), "zorder": 3 if provider.startswith("ours") else 2}
        ls = "--" if "-oneread" in provider else "-"
        axes.plot(scored, [m["p50"] for m in ms], ls=ls, marker="o", ms=2.5, lw=1.4, **style)
        spread = [m["p20"] for m in ms], [m["p80"] for m in ms]
        axes.fill_between(scored, *spread, color=style["color"], alpha=0.15, lw=0)
        ends.append((ms[0]["p50"], title, style["color"]))
    axes.set_yscale("log")
    _label_ends(axes, ends)
    _plain_ticks(axes.yaxis)
    axes.set_title(name, fontsize=FONT + 1)
    axes.set_xlabel("% of rows scored", fontsize=FONT)
    axes.set_ylabel("ms, log scale", fontsize=FONT)
    axes.tick_params(labelsize=FONT)
    axes.grid(alpha=0.25)


def _label_ends(axes, ends):
    """Write each line's name at its right end. Move it up if it would cover the name below."""
    low, high = axes.get_ylim()
    step, at, placed = 0.075, -1.0, []
    for value, title, tint in sorted(ends):
        at = max(at + step, math.log(value / low) / math.log(high / low))
        placed.append([at, title, tint])
    limit = 0.97
    for label in reversed(placed):  # move down again what is above the top
        label[0] = min(label[0], limit)
        limit = label[0] - step
    for at, title, tint in placed:
        text = "black" if tint == REFERENCE else "#707070" if tint == PEER else tint
        axes.annotate(
            title, (1.02, at), xycoords="axes fraction", fontsize=FONT - 1, color=text, va="center"
        )


def _plain_ticks(axis):
    """Ticks at 1, 2, 5, 10, ..., so that a log axis of less than a decade has numbers too."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.set_tick_params(labelsize=FONT)


def _ms(value):
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"

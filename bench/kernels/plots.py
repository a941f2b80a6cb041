"""Pictures of a record: time by scored fraction, memory, and the roofline."""

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: small files, and their diffs say
matplotlib.rcParams["svg.hashsalt"] = "bench"  # the same record draws the same file

from matplotlib import pyplot as plt  # noqa: E402

from ..errors import UserError  # noqa: E402
from .record import device_and_threads  # noqa: E402

COLORS = plt.get_cmap("tab10").colors
MARKERS, DASHES = "os^", ("-", "--", ":")  # when the colours have all been used
MIB = 2**20
MODELS = 5  # panels of times in a row, at most
PANEL = 3.5, 3.2  # inches


def draw(record, path):
    """Write the picture; the ending of `path` chooses SVG or PNG. UserError with nothing timed."""
    groups = _groups(record)
    if not groups:
        raise UserError("there is nothing to draw: no provider was timed; see --list")
    titles = list(dict.fromkeys(row["title"] for row in record["rows"] if row["ms"]))
    styles = {title: _style(number) for number, title in enumerate(titles)}
    columns = min(MODELS, len(groups))
    lines = -(-len(groups) // columns)
    # Below, every provider has a line of its own, twice.
    heights = lines * PANEL[1], max(PANEL[1], 0.23 * len(titles) + 0.6)
    size = max(4, columns) * PANEL[0], sum(heights)
    figure = plt.figure(figsize=size, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    grid = above.add_gridspec(lines, columns)
    for place, (name, cases) in zip(grid, groups.items(), strict=False):
        _times(above.add_subplot(place), name, cases, record, styles)
    largest = max(groups.values(), key=len)
    memory, roofline, legend = below.add_gridspec(1, 3, width_ratios=(5, 4, 3))
    _memory(below.add_subplot(memory), largest, record, styles)
    _roofline(below.add_subplot(roofline), largest, record, styles)
    _legend(below.add_subplot(legend), styles)
    mode = {"fwd": "forward", "bwd": "backward", "full": "forward + backward"}
    machine = record["machine"]
    figure.suptitle(
        f"masked next-token loss, {mode[record['settings']['mode']]}: "
        f"{device_and_threads(machine)}, {machine['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _style(number):
    """Keywords of a provider's lines and points, all alike wherever it is drawn."""
    again, color = divmod(number, len(COLORS))
    again %= len(MARKERS)
    return {"color": COLORS[color], "marker": MARKERS[again], "linestyle": DASHES[again]}


def _groups(record):
    """Name -> indices of timed cases that differ in the scored fraction alone, largest first."""
    groups, timed = {}, {row["case"] for row in record["rows"] if row["ms"]}
    for index, case in sorted(enumerate(record["cases"]), key=lambda pair: pair[1]["tp"]):
        if index not in timed:
            continue
        kind = "" if case["tp"] == 1 else f" TP {case['tp']}"
        kind += ", one shard" if case["tp"] > case["nproc"] else ""
        name = f"{case['model']}{kind}: {case['rows']} x {case['columns']} {case['dtype']}"
        groups.setdefault(name, []).append(index)
    return {
        name: sorted(found, key=lambda i: -record["cases"][i]["scored"])
        for name, found in groups.items()
    }


def _rows(record, indices, key="ms"):
    """Title -> rows of these cases that have `key`, in their order."""
    found = {}
    for index in indices:
        for row in record["rows"]:
            if row["case"] == index and row[key]:
                found.setdefault(row["title"], []).append(row)
    return found


def _times(axes, name, indices, record, styles):
    for title, rows in _rows(record, indices).items():
        scored = [record["cases"][row["case"]]["scored"] * 100 for row in rows]
        ms = [row["ms"] for row in rows]
        axes.plot(scored, [m["p50"] for m in ms], **styles[title], ms=3, lw=1.2)
        spread = [m["p20"] for m in ms], [m["p80"] for m in ms]
        axes.fill_between(scored, *spread, color=styles[title]["color"], alpha=0.15, lw=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.set_title(name, fontsize=8)
    axes.set_xlabel("% of rows scored", fontsize=8)
    axes.set_ylabel("ms, median (p20 to p80 shaded)", fontsize=7)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def _memory(axes, indices, record, styles):
    """Peaks as multiples of the logits, of the first case: forward light, both full."""
    rows = [found[0] for found in _rows(record, indices[:1], "memory").values()][::-1]
    places = range(len(rows))
    for offset, key, alpha in ((0.2, "forward_x_logits", 0.45), (-0.2, "full_x_logits", 1.0)):
        values = [row[key] for row in rows]
        tints = [styles[row["title"]]["color"] for row in rows]
        bars = axes.barh([p + offset for p in places], values, 0.38, color=tints, alpha=alpha)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=6, padding=2)
    axes.set_yticks(list(places), [row["title"] for row in rows], fontsize=6)
    axes.margins(x=0.15)
    case = record["cases"][indices[0]]
    axes.set_title(f"peak memory beyond the logits, {case['model']}", fontsize=8)
    axes.set_xlabel("x logits (light: forward, full: with backward)", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)


def _roofline(axes, indices, record, styles):
    """Elements a second over the least bytes per element; the lines are what the machine copies
    and zeroes, measured in the same run."""
    roofs = [record["cases"][index]["roof"] for index in indices]
    least = []
    for title, rows in _rows(record, indices).items():
        points = [_point(record["cases"][row["case"]], row) for row in rows]
        least += [x for x, _ in points]
        axes.plot(*zip(*points, strict=True), **{**styles[title], "linestyle": "none"}, ms=3.5)
    if least and all(roofs):
        ends = [min(least) * 0.9, max(least) * 1.1]
        for key, style in (("copy_gb_per_s", "k-"), ("zero_gb_per_s", "k--")):
            bandwidth = sorted(roof[key] for roof in roofs)[len(roofs) // 2]
            label = f"{key.split('_')[0]}, {bandwidth:.1f} GB/s"
            axes.plot(ends, [bandwidth / x for x in ends], style, lw=1, label=label)
        axes.legend(fontsize=6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain = matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 4, 6)))
    axes.set_title(f"roofline, {record['cases'][indices[0]]['model']}", fontsize=8)
    axes.set_xlabel("least bytes per element", fontsize=8)
    axes.set_ylabel("10^9 elements / s", fontsize=7)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def _point(case, row):
    elements = case["rows"] * case["columns"]
    seconds = row["ms"]["p50"] / 1e3
    return row["gb_per_s"] * 1e9 * seconds / elements, elements / seconds / 1e9


def _legend(axes, styles):
    axes.axis("off")
    for title, style in styles.items():
        axes.plot([], [], **style, ms=4, label=title)
    axes.legend(loc="center", fontsize=8, frameon=False)

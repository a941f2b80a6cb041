"""docs/benchmarks.md: the tables of one record."""

from ..kernels import record
from .markdown import milliseconds, origin, table

SHOWN = ("mistral-nemo", 0.3)  # model of the long table, and the second scored fraction
PEAKS = ("forward_x_logits", "full_x_logits")


def section(measured, name):
    """The Markdown of one record. Its picture is img/NAME.png."""
    rows = [
        {**row, "of": measured["cases"][row["case"]]}
        for row in measured["rows"]
        if row["case"] is not None
    ]
    models = list(dict.fromkeys(row["of"]["model"] for row in rows))
    model = SHOWN[0] if SHOWN[0] in models else models[0]
    mine = [row for row in rows if row["of"]["model"] == model]
    fewest = min(row["of"]["tp"] for row in mine)
    mine = [row for row in mine if row["of"]["tp"] == fewest]
    return "\n\n".join(
        [
            _where(measured),
            _providers(mine),
            _reasons(measured),
            _cases(rows),
            _memory(rows),
            f"![Time and peak memory of every loss]({picture(name)})",
        ]
    )


def picture(name):
    return f"img/{name}.png"


def _where(measured):
    """Machine, date, versions, bandwidth and command."""
    machine, settings = measured["machine"], measured["settings"]
    text = record.remark(measured)
    lines = [
        f"- Device: {record.device_and_threads(machine)}",
        *origin(machine),
        f"- Memory bandwidth of a copy: {_bandwidth(measured)}",
        f"- Seed: {settings['seed']}",
        f"- Command: `{machine['command']}`",
    ]
    if "load_average" in machine:
        lines.insert(3, f"- Load average before the run: {machine['load_average']:.1f}")
    return "\n".join(lines) + (f"\n\n{text}." if text else "")


def _bandwidth(measured):
    roofs = [case for case in measured["cases"] if case["roof"]]
    alone = [case["roof"]["copy_gb_per_s"] for case in roofs if case["nproc"] == 1]
    if not roofs:
        return "not measured"
    if alone:
        return f"{min(alone):.0f} to {max(alone):.0f} GB/s"
    return f"{max(case['roof']['copy_gb_per_s'] for case in roofs):.0f} GB/s"


def _at(rows, scored):
    return {row["title"]: row for row in rows if row["of"]["scored"] == scored}


def _providers(rows):
    """One line for each provider, with all rows scored and with the fraction in SHOWN."""
    part = SHOWN[1]
    full, some = _at(rows, 1.0), _at(rows, part)
    case = rows[0]["of"]
    head = (
        f"{case['model']}: {case['rows']} x {case['columns']}, {case['dtype']}",
        "correct",
        "ms, all scored",
        f"ms, {part:.0%} scored",
        "speed-up",
        "% of roof",
        "peak, forward",
        "peak, with backward",
    )
    lines = [
        _line(title, row, some.get(title))
        for title, row in full.items()
        if row["status"] != "unavailable"
    ]
    return table(head, lines, left=2)


def _line(title, row, part):
    if not row["ms"]:
        return [title, row["status"], *[""] * 6]
    check = "yes" if row["check"] and row["check"]["ok"] else "no"
    speed = "" if row["speedup"] is None else f"{row['speedup']:.1f}x"
    roof = "" if row["of_roof"] is None else f"{row['of_roof']:.0%}"
    peaks = [f"{row[key]:.2f}x" if row["memory"] else "" for key in PEAKS]
    return [title, check, milliseconds(row), milliseconds(part), speed, roof, *peaks]


def _reasons(measured):
    """Which providers did not run, and why."""
    found = record.never_ran(measured).items()
    if not found:
        return "Every loss ran on this machine."
    names = {why: dict.fromkeys(title.split(",")[0] for title in titles) for why, titles in found}
    lines = [f"- {', '.join(titles)}: {reason}" for reason, titles in names.items()]
    return "\n".join(["Not run on this machine:", "", *lines])


def _cases(rows):
    """Ours in place, for all models and scored fractions: ms and speed-up."""
    ours = _ours_in_place(rows)
    if not ours:
        return "None of ours was timed."
    fractions = sorted({row["of"]["scored"] for row in ours}, reverse=True)
    lines = {}
    for row in ours:
        case = row["of"]
        kind = "" if case["nproc"] > 1 or case["tp"] == 1 else ", one shard"
        key = f"{case['model']}, TP {case['tp']}{kind}"
        times = "" if row["speedup"] is None else f" ({row['speedup']:.0f}x)"
        lines.setdefault(key, {})[case["scored"]] = milliseconds(row) + times
    head = (f"{ours[0]['title']}: ms (speed-up)", *(f"{f:.0%} scored" for f in fractions))
    body = [[name, *(cells.get(f, "") for f in fractions)] for name, cells in lines.items()]
    return table(head, body, left=1)


def _ours_in_place(rows):
    """The timed rows of the best of our backends that has any."""
    for name in ("cpu", "cuda", "hip", "triton", "eager"):
        found = [r for r in rows if r["provider"] == f"ours-{name}-inplace" and r["ms"]]
        if found:
            return found
    return []


def _memory(rows):
    """The largest peak of each of our providers over all cases."""
    peaks = {}
    for row in rows:
        if row["provider"].startswith("ours-") and row["memory"]:
            peaks.setdefault(row["title"], []).append(row["full_x_logits"])
    count = len({row["case"] for row in rows if row["memory"]})
    if not peaks:
        return "No memory was measured."
    lines = [[title, f"{max(all_):.4f}x"] for title, all_ in peaks.items()]
    return table((f"largest peak beyond the logits, {count} cases", "x logits"), lines, left=1)

"""python -m bench readme: the README's figures, written from the records in bench/results.

What stands between the two markers is made from the JSON alone; --check fails when it is not.
"""

from pathlib import Path

from .errors import UserError
from .kernels import record

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- measured: make bench -->", "<!-- end of measured -->"
SHOWN = ("mistral-nemo", 0.3)  # of which model, and beside all rows: this part scored


def add_arguments(parser):
    parser.add_argument("--check", action="store_true", help="change nothing; fail if it would")
    parser.add_argument("--readme", default=str(ROOT / "README.md"), metavar="PATH")
    parser.add_argument("--results", default=str(ROOT / "bench/results"), metavar="DIR")


def run(args):
    path = Path(args.readme)
    try:
        before = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    after = with_figures(before, Path(args.results))
    if after == before:
        return 0
    if args.check:
        raise UserError(
            f"{path.name}: expected the figures of {args.results}, got others; write them with: "
            "python -m bench readme"
        )
    path.write_text(after, encoding="utf-8")
    print(f"written: {path}")
    return 0


def with_figures(text, folder):
    """The README `text` with the figures of all records in `folder`."""
    parts = text.split(BEGIN), text.split(END)
    if [len(part) for part in parts] != [2, 2]:
        raise UserError(f"the README: expected the markers {BEGIN} and {END}, once each")
    records = sorted(folder.glob("*.json"))
    if not records:
        raise UserError(f"expected records in {folder}, got none; make them with: make bench")
    sections = [section(record.read(path), path) for path in records]
    return parts[0][0] + BEGIN + "\n\n" + "\n\n".join(sections) + "\n\n" + END + parts[1][1]


def section(measured, path):
    """The Markdown of one record."""
    rows = [
        {**row, "of": measured["cases"][row["case"]]}
        for row in measured["rows"]
        if row["case"] is not None
    ]
    models = list(dict.fromkeys(row["of"]["model"] for row in rows))
    model = SHOWN[0] if SHOWN[0] in models else models[0]
    mine = [row for row in rows if row["of"]["model"] == model and row["of"]["tp"] == 1]
    return "\n\n".join(
        [
            _where(measured),
            _providers(mine),
            _reasons(measured),
            _cases(rows),
            _memory(rows),
            f"![time, memory and roofline](bench/results/{path.stem}.svg)",
        ]
    )


def _where(measured):
    machine, settings = measured["machine"], measured["settings"]
    text = record.remark(measured)
    versions = machine["versions"]
    copies = sorted(case["roof"]["copy_gb_per_s"] for case in measured["cases"] if case["roof"])
    alone = [c["roof"]["copy_gb_per_s"] for c in measured["cases"] if c["roof"] and c["nproc"] == 1]
    fastest = f"{min(alone):.0f} to {max(alone):.0f} GB/s" if alone else f"{copies[-1]:.0f} GB/s"
    busy = (
        f"; load average {machine['load_average']:.1f} before" if "load_average" in machine else ""
    )
    return (
        f"**{record.device_and_threads(machine)}**, {machine['date'][:10]}, commit "
        f"{machine['commit']}, torch {versions['torch']}, megatron-core "
        f"{versions['megatron-core']}, seed {settings['seed']}; it copies {fastest}{busy}.\n"
        f"`{machine['command']}`" + (f"\n{text}." if text else "")
    )


def _at(rows, scored):
    return {row["title"]: row for row in rows if row["of"]["scored"] == scored}


def _providers(rows):
    """One line a provider: all rows scored, and the shown part of them."""
    part = SHOWN[1]
    full, some = _at(rows, 1.0), _at(rows, part)
    case = rows[0]["of"]
    head = (
        f"{case['model']}: {case['rows']} x {case['columns']}, {case['dtype']}",
        "",
        "ms, all scored",
        f"ms, {part:.0%} scored",
        "x reference",
        "% of roof",
        "peak, forward",
        "peak, with backward",
    )
    lines = [
        _line(title, row, some.get(title))
        for title, row in full.items()
        if row["status"] != "unavailable"
    ]
    return _markdown(head, lines, left=2)


def _line(title, row, part):
    if not row["ms"]:
        return [title, row["status"], *[""] * 6]
    check = "✓" if row["check"]["ok"] else "✗"
    speed = "" if row["speedup"] is None else f"{row['speedup']:.1f}"
    roof = "" if row["of_roof"] is None else f"{row['of_roof']:.0%}"
    peaks = [f"{row[key]:.2f}x" if row["memory"] else "" for key in PEAKS]
    return [title, check, _ms(row), _ms(part), speed, roof, *peaks]


PEAKS = ("forward_x_logits", "full_x_logits")


def _ms(row):
    if not row or not row["ms"]:
        return ""
    p50 = row["ms"]["p50"]
    return f"{p50:.1f}" if p50 >= 10 else f"{p50:.2f}"


def _reasons(measured):
    """Who was not run, and why: one line a reason."""
    found = record.never_ran(measured).items()
    names = {why: dict.fromkeys(title.split(",")[0] for title in titles) for why, titles in found}
    listed = "; ".join(f"{', '.join(titles)} ({reason})" for reason, titles in names.items())
    return f"Not run here: {listed}."


def _cases(rows):
    """Ours in place over all models and fractions: ms, and times the reference."""
    ours = [r for r in rows if _is_ours_in_place(r) and r["ms"]]
    fractions = sorted({row["of"]["scored"] for row in ours}, reverse=True)
    lines = {}
    for row in ours:
        case = row["of"]
        kind = "" if case["nproc"] > 1 or case["tp"] == 1 else ", one shard"
        key = f"{case['model']}, TP {case['tp']}{kind}"
        times = "" if row["speedup"] is None else f" ({row['speedup']:.0f}x)"
        lines.setdefault(key, {})[case["scored"]] = _ms(row) + times
    head = (f"{ours[0]['title']}: ms (times the reference)", *(f"{f:.0%}" for f in fractions))
    body = [[name, *(cells.get(f, "") for f in fractions)] for name, cells in lines.items()]
    return _markdown(head, body, left=1)


def _is_ours_in_place(row):
    return row["provider"] in ("ours-cpu-inplace", "ours-cuda-inplace", "ours-hip-inplace")


def _memory(rows):
    """The largest peak of each of ours over all cases, in one sentence."""
    peaks = {}
    for row in rows:
        if row["provider"].startswith("ours-") and row["memory"]:
            peaks.setdefault(row["title"], []).append(row["full_x_logits"])
    told = "; ".join(f"{title} {max(all_):.4f}x" for title, all_ in peaks.items())
    count = len({row["case"] for row in rows if row["memory"]})
    return f"Largest peak beyond the logits over all {count} cases, as multiples of them: {told}."


def _markdown(head, lines, left):
    rule = ["---" if number < left else "---:" for number in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))

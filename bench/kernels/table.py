"""Terminal output: measured rows, predictions, broken promises."""

import sys

from ..terminal import console, new_table
from .provider import Provider
from .record import never_ran, remark

MIB = 2**20
SLOW = 5  # a smaller speed-up over the reference gets a line below the table
PER_ROW = 2**13  # bytes that ours may take for each row, beyond the gradient

COLUMNS = ("case", "provider", "check", "ms p50 (p20-p80)", "tokens/s", "peak MiB fwd")
COLUMNS += ("fwd+bwd", "x logits", "GB/s", "% roof", "speed-up")


def show(record, old=None):
    """Print all measured rows. Providers that never ran are listed once, with the reason."""
    out = console()
    mode = {"fwd": "forward", "bwd": "backward", "full": "forward + backward"}
    title = f"{mode[record['settings']['mode']]}, {record['machine']['device']}"
    table = new_table(out, title, COLUMNS + (("change",) if old else ()))
    for index, case in enumerate(record["cases"]):
        rows = [row for row in record["rows"] if row["case"] == index]
        for number, row in enumerate(rows):
            table.add_row("" if number else _case(case), *_cells(row, bool(old)))
        table.add_section()
    out.print(table)
    for case in record["cases"]:
        if case["roof"]:
            roof = "copy {copy_gb_per_s:.1f} GB/s, zero {zero_gb_per_s:.1f} GB/s"
            out.print(f"bandwidth here, {_case(case)}: {roof.format(**case['roof'])}")
    if text := remark(record):
        out.print(f"{text}.")
    for (status, title, reason), names in _reasons(record).items():
        more = f" and {len(names) - 1} more" if names[1:] else ""
        out.print(f"{status}: {title}: {reason}: {names[0]}{more}")
    for reason, titles in never_ran(record).items():
        out.print(f"not run: {'; '.join(titles)}: {reason}")


def _reasons(record):
    """{(status, title, reason): the cases with that status and reason}."""
    found = {}
    for row in record["rows"]:
        if row["reason"] and row["case"] is not None:
            key = row["status"], row["title"], row["reason"]
            found.setdefault(key, []).append(_case(record["cases"][row["case"]]))
    return found


def _case(case):
    kind = "" if case["tp"] == 1 else f" TP{case['tp']}" + ("" if case["nproc"] > 1 else " shard")
    size = f"{case['rows']}x{case['columns']}"
    return f"{case['model']}{kind} {size} {case['dtype']} {case['scored']:.0%}"


def _cells(row, changed):
    name = row["title"]
    if not row["ms"]:
        return [name, check_cell(row), row["status"]]
    ms = row["ms"]
    cells = [
        name,
        check_cell(row),
        f"{ms['p50']:.2f} ({ms['p20']:.2f}-{ms['p80']:.2f})",
        f"{row['tokens_per_s']:,.0f}",
        *_memory(row),
        f"{row['gb_per_s']:.1f}",
        "" if row["of_roof"] is None else f"{row['of_roof']:.0%}",
        "" if row["speedup"] is None else f"{row['speedup']:.1f}",
    ]
    if changed:
        cells.append("" if row["change"] is None else f"{row['change']:+.0%}")
    return cells


def check_cell(row):
    if not row["check"]:
        return ""
    return f"{'✓' if row['check']['ok'] else '✗'} {row['check']['gradient_error']:.0e}"


def _memory(row):
    if not row["memory"]:
        return [(row["reason"] or "")[:24], "", ""]
    forward, full = (row["memory"][name] / MIB for name in ("forward", "full"))
    times = f"{row['forward_x_logits']:.2f}, {row['full_x_logits']:.2f}"
    return [f"{forward:.2f}", f"{full:.2f}", times]


def show_list(models, providers, case, device):
    out = console()
    table = new_table(out, "models: --model", ("name", "vocabulary", "columns", "softcap"), 1)
    for model in models.values():
        table.add_row(model.name, str(model.vocab), str(model.padded), str(model.softcap or ""))
    out.print(table)
    table = new_table(out, f"providers: --provider, for {case.name}", ("name", "", "here"), 3, 2)
    for provider in providers:
        table.add_row(provider.name, provider.title, _here(provider, case, device))
    out.print(table)


def _here(provider: Provider, case, device):
    return provider.reason_against(case, device) or "yes"


def show_predictions(cases, providers, device, needed, free):
    """Print what --dry-run predicts. Nothing is measured."""
    out = console()
    names = ("case", "provider", "logits MiB", "predicted peak MiB fwd", "fwd+bwd", "whole run MiB")
    table = new_table(
        out, "PREDICTED, not measured: peak memory of one process beyond the logits", names
    )
    for case in cases:
        for provider in providers:
            if provider.reason_against(case, device):
                continue
            peaks = (f"{peak / MIB:.1f}" for peak in provider.predicted_bytes(case))
            sizes = f"{case.logits_bytes / MIB:.1f}", *peaks, f"{needed(case) / MIB:.0f}"
            table.add_row(case.name, provider.title, *sizes)
        table.add_section()
    out.print(table)
    out.print("free memory: " + ("unknown" if free is None else f"{free / MIB:.0f} MiB"))


def show_files(paths):
    for path in paths:
        console().print(f"written: {path}")


def verdict(record):
    """Exit status: 1 if ours is wrong or takes more memory than promised. Prints a line for each.

    A speed-up below SLOW is printed but is no failure, because times depend on the machine's load.
    """
    slow = {}
    for name, row, _ in _ours(record):
        if row["speedup"] is not None and row["speedup"] < SLOW:
            slow.setdefault(row["title"], []).append((row["speedup"], name))
    for title, found in slow.items():
        least, name = min(found)
        print(
            f"bench: slow: {title}: a speed-up below {SLOW}x in {len(found)} of "
            f"{len(record['cases'])} cases; the smallest: "
            f"{least:.1f}x in {name.partition(':')[0]}",
            file=sys.stderr,
        )
    broken = broken_promises(record)
    for line in broken:
        print(f"bench: broken promise: {line}", file=sys.stderr)
    return 1 if broken else 0


def broken_promises(record):
    """A line for each row of ours that is wrong, failed or takes more memory than promised.

    A pending row of an interrupted run is none.
    """
    broken = []
    for name, row, case in _ours(record):
        if row["status"] not in ("ok", "unavailable", "pending"):
            broken.append(f"{name}: {row['status']}: {row['reason']}")
        broken += [f"{name}: {text}" for text in over_promise(row, case)]
    return broken


def _ours(record):
    """(name, row, case) of each row of ours that has a case."""
    for row in record["rows"]:
        if row["case"] is not None and row["provider"].startswith("ours-"):
            case = record["cases"][row["case"]]
            yield f"{_case(case)}: {row['title']}", row, case


def over_promise(row, case):
    """Yield a line for each broken promise on memory: at most one gradient, in place none."""
    if not row["memory"] or "-eager-" in row["provider"]:  # its tiles have a constant size
        return
    inplace, one_read = "inplace" in row["provider"], "oneread" in row["provider"]
    gradient = 0 if inplace else case["logits_bytes"]
    allowed = {"forward": gradient if one_read else 0, "full": gradient}
    for name, most in allowed.items():
        most += PER_ROW * case["rows"]
        if row["memory"][name] > most:
            yield f"expected at most {most} bytes, got a {name} peak of {row['memory'][name]}"

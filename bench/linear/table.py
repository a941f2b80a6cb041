"""Terminal output of a record: measured rows, broken promises."""

import sys

from ..kernels.record import never_ran
from ..kernels.table import MIB, check_cell
from ..terminal import console, new_table

COLUMNS = ("provider", "check", "ms p50 (p20-p80)", "forward ms", "x products")
COLUMNS += ("peak MiB", "bytes", "chunks")


def show(record):
    """Print a table for each case, with the bare products first."""
    out = console()
    for index, case in enumerate(record["cases"]):
        rows = [row for row in record["rows"] if row["case"] == index]
        title = f"forward + backward, {case['name']}, {record['machine']['device']}"
        table = new_table(out, title, COLUMNS, left=1)
        if case["products"]:
            _add_products(table, case["products"])
        for row in rows:
            table.add_row(*_cells(row))
        out.print(table)
        for row in rows:
            if row["reason"]:
                out.print(f"{row['status']}: {row['title']}: {row['reason']}")
    for line in _explained(record):
        out.print(line)


def _add_products(table, products):
    for count, key in ((3, "three_ms"), (4, "four_ms")):
        name = f"{count} bare products, {products['dtype']}"
        table.add_row(name, "", f"{products[key]:.2f}", *[""] * 5)
    table.add_section()


def _cells(row):
    if not row["ms"]:
        return [row["title"], check_cell(row), row["status"], *[""] * 5]
    ms, ratio = row["ms"], row["x_products"]
    return [
        row["title"],
        check_cell(row),
        f"{ms['p50']:.2f} ({ms['p20']:.2f}-{ms['p80']:.2f})",
        f"{row['forward_ms']:.2f}",
        "" if ratio is None else f"{ratio:.2f} of {row['products']}",
        *_memory(row),
    ]


def _memory(row):
    if not row["memory"]:
        return ["", "", ""]
    peak, chunks = row["memory"]["full"], row["chunks"]
    return [f"{peak / MIB:.2f}", f"{peak:,}", "" if chunks is None else f"{chunks:.3f}"]


def _explained(record):
    """Sentences below the tables."""
    yield (
        "x products: the time over that of as many bare products of the scored rows as the "
        "provider computes. Peak: beyond inputs and gradients; in chunks: of chunk_rows rows."
    )
    for dtype in {case["dtype"] for case in record["cases"] if _in_fp32(case)}:
        yield (
            f"This CPU has no instructions for {dtype} products, so the bare products are fp32 "
            "products with an fp32 weight that was made before."
        )
    for reason, titles in never_ran(record).items():
        yield f"not run: {'; '.join(titles)}: {reason}"


def _in_fp32(case):
    return case["products"] and case["products"]["dtype"] == "float32" and case["dtype"] != "fp32"


def verdict(record):
    """Exit status: 1 if ours is wrong or failed. Prints a line for each."""
    broken = broken_promises(record)
    for line in broken:
        print(f"bench: broken promise: {line}", file=sys.stderr)
    return 1 if broken else 0


def broken_promises(record):
    """A line for each row of ours that is wrong or failed. A pending row is none."""
    return [
        f"{record['cases'][row['case']]['name']}: {row['title']}: {row['status']}: {row['reason']}"
        for row in record["rows"]
        if row["provider"].startswith("ours-")
        and row["status"] not in ("ok", "unavailable", "pending")
    ]

"""Markdown tables, and the format of numbers on the pages."""

UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def table(head, lines, left):
    """A Markdown table; the first `left` columns are aligned to the left."""
    rule = ["---" if number < left else "---:" for number in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def origin(machine):
    """Lines of a list: when and with what a record was made."""
    versions = machine["versions"]
    return [
        f"- Date and commit: {machine['date'][:10]}, {machine['commit']}",
        f"- Versions: torch {versions['torch']}, megatron-core {versions['megatron-core']}",
    ]


def milliseconds(row):
    """The median of a timed row, or an empty text."""
    if not row or not row["ms"]:
        return ""
    p50 = row["ms"]["p50"]
    return f"{p50:.1f}" if p50 >= 10 else f"{p50:.2f}"


def size(count):
    """Bytes in the largest unit in which the number is at least 1."""
    unit, name = next((pair for pair in UNITS if count >= pair[0]), (1, "bytes"))
    return f"{count / unit:.1f} {name}" if unit > 1 else f"{count} {name}"

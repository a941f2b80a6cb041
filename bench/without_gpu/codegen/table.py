"""Print the tables of `python -m bench codegen`."""

from rich.table import Table

from ..chips import CHIPS

#: Order of a record's loops. Only the JSON has the loops that store zeros.
SHOWN = ("one read", "statistics", "gradient", "rescaling")
LOOPS = {"one read": "both", "statistics": "stats", "gradient": "grad", "rescaling": "rescale"}


def show(console, ours: list[dict], theirs: list[dict], absent: list[dict]) -> None:
    rows = [r for r in ours if r["pass"]]
    if rows:
        console.print(_loops("row kernels: the hot loops", rows, absent))
    rest = [r for r in ours if not r["pass"]]
    if rest:
        console.print(_resources(rest))
    if theirs:
        console.print(_loops("Liger: the hot loops", theirs))
        console.print(beside(ours, theirs))
        console.print(
            "Liger computes the gradient in forward: one launch reads the row for the statistics, "
            "reads it again and overwrites it with the gradient (6 bytes per bf16 element). Its "
            "backward returns that, or, when the upstream gradient is not 1, reads and overwrites "
            "it once more (rescaling, 4 bytes more). Ours: statistics in forward, gradient in "
            "backward, any upstream gradient."
        )
    for one in absent:
        console.print(f"{one['target']} {one['backend']}: not compiled: {one['reason']}")


def show_violations(console, ours, broken) -> None:
    for record, text in broken:
        where = f"{record['target']} {record['backend']} {_name(record)}"
        console.print(f"[red]{where}:[/red] {text}")
    kernels = f"{len(ours)} compiled kernels"
    console.print(f"{kernels}: {len(broken)} violations" if broken else f"{kernels}: all sound")


def _loops(title: str, records: list[dict], absent: list[dict] = ()) -> Table:
    caption = (
        "bytes (loaded+stored), instructions and exp per element of the logits; loads: that a "
        "thread waits for together, KB: those of all threads of an SM or CU; predicted: a roofline "
        "of these counts on "
        + ", ".join(f"{c.device} {c.bandwidth / 1e12:g} TB/s" for c in CHIPS.values())
        + "; nothing here was timed"
    )
    table = Table(title=title, caption=caption)
    for name in ("target", "backend", "kernel", "loop"):
        table.add_column(name, no_wrap=True)
    for name in ("thr", "regs", "spill", "smem", "occ", "ld/st", "bytes", "instr", "exp", "loads",
                 "KB", "bound", "predicted"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        for purpose in SHOWN:
            if loop := record["loops"].get(purpose):
                table.add_row(
                    record["target"],
                    record["backend"],
                    _name(record),
                    LOOPS[purpose],
                    *_figures(record, loop),
                )
    for one in absent:
        table.add_row(one["target"], one["backend"], "not compiled, see below")
    return table


def _name(record: dict) -> str:
    limit = f" ..{record['columns']}" if record["columns"] else ""
    return record["name"].replace("bfloat", "bf").replace("float", "fp") + limit


def _figures(record: dict, loop: dict) -> list[str]:
    widths = (loop["load_bytes"], loop["store_bytes"])
    predicted = loop["predicted"]
    return [
        str(record["threads"]),
        _registers(record),
        str(record["spills"]),
        str(record["shared_bytes"]),
        f"{record['occupancy']:.0%}",
        "/".join(",".join(map(str, w)) or "-" for w in widths),
        _bytes(loop),
        f"{loop['instructions']:.2f}",
        f"{loop['exps']:.2f}",
        str(loop["loads_at_once"]),
        f"{loop['in_flight'] / 1024:.0f}",
        predicted["bound"],
        f"{predicted['bytes_per_second'] / 1e9:.0f} GB/s",
    ]


def _bytes(loop: dict) -> str:
    """Loaded and stored bytes; in brackets the bytes requested from the L1 cache, if more."""
    asked = f"({loop['requested']:g})" if loop["requested"] != loop["loaded"] else ""
    return f"{loop['loaded']:g}{asked}+{loop['stored']:g}"


def _registers(record: dict) -> str:
    """Registers per thread; on AMD VGPRs (AGPRs included) and SGPRs."""
    if record["target"].startswith("gfx"):
        return f"{record['registers']}({record['agprs']})+{record['sgprs']}"
    return str(record["registers"])


def _resources(records: list[dict]) -> Table:
    table = Table(title="kernels over vectors of rows")
    for name in ("target", "backend", "kernel"):
        table.add_column(name, no_wrap=True)
    for name in ("threads", "registers", "spills", "shared", "occupancy"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in records:
        table.add_row(
            r["target"], r["backend"], r["name"], str(r["threads"]), _registers(r),
            str(r["spills"]), str(r["shared_bytes"]), f"{r['occupancy']:.0%}",
        )  # fmt: skip
    return table


def beside(ours: list[dict], theirs: list[dict]) -> Table:
    """Compare our plain passes with the same loops of the peer."""
    table = Table(title="ours beside Liger, per element: bytes, instructions, exp")
    for name in ("target", "backend", "dtype", "loop", "line"):
        table.add_column(name, no_wrap=True)
    for name in ("bytes", "Liger", "instr", "Liger", "exp", "Liger", "regs", "Liger", "spills",
                 "Liger"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for r, loop, other, their in pairs(ours, theirs):
        table.add_row(
            r["target"], r["backend"], r["dtype"], loop["purpose"], f"..{r['columns'] or ''}",
            f"{loop['loaded'] + loop['stored']:g}", f"{their['loaded'] + their['stored']:g}",
            f"{loop['instructions']:.2f}", f"{their['instructions']:.2f}",
            f"{loop['exps']:.2f}", f"{their['exps']:.2f}",
            str(r["registers"]), str(other["registers"]),
            str(r["spills"]), str(other["spills"]),
        )  # fmt: skip
    return table


def executed(records: list[dict]) -> Table:
    table = Table(
        title="as executed in the PTX interpreter, per element of two scored rows",
        caption="bytes of the logits and their gradient; PTX instructions, not machine code's",
    )
    for name in ("target", "backend", "dtype", "pass"):
        table.add_column(name, no_wrap=True)
    for name in ("loaded", "stored", "ex2", "shuffles", "instr"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in records:
        figures = (f"{r[k]:.3f}" for k in ("loaded", "stored", "exps", "shuffles", "instructions"))
        table.add_row(r["target"], r["backend"], r["dtype"], r["pass"], *figures)
    return table


def pairs(ours: list[dict], theirs: list[dict]):
    """(our record, its loop, the peer's record, its loop) for plain passes of the same width."""
    passes = ("statistics", "gradient")
    for r in (r for r in ours if is_plain(r) and r["pass"] in passes):
        for other in theirs:
            same = all(other[key] == r[key] for key in ("target", "dtype", "columns"))
            if same and r["pass"] in other["loops"]:
                yield r, r["loops"][r["pass"]], other, other["loops"][r["pass"]]


def is_plain(record: dict) -> bool:
    """Whether it is a pass of plain training: no options, rows at multiples of 16 bytes."""
    options = ("softcap", "x4", "x6", "entropy")  # x4: label smoothing; x6: metrics
    named = any(word in record["name"] for word in options)
    return bool(record["pass"]) and record["aligned"] and not named

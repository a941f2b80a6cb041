"""`python -m bench codegen`: registers, memory traffic and instructions of the compiled kernels."""

import json
from pathlib import Path

from ... import interrupts, machine
from ...errors import UserError, need, writable_file, writable_folder
from ..chips import CHIPS, TRITON
from . import toolchains
from .audit import violations

DTYPES = ("bfloat16", "float16", "float32")
BACKENDS = ("triton", "cuda", "hip")


def add_arguments(parser):
    add = parser.add_argument
    add("--backend", action="append", choices=BACKENDS, help="default: what has a compiler here")
    add("--kernel", metavar="NAME", help="only kernels whose name holds this")
    add("--target", action="append", choices=tuple(CHIPS), help="only these; may be repeated")
    add("--dtype", action="append", choices=DTYPES, help="of the logits; may be repeated")
    add("--options", action="store_true", help="also softcap, smoothing, metrics, unaligned rows")
    add("--executed", action="store_true", help="also run NVIDIA's PTX on this CPU, and count")
    add("--peer", choices=("liger",), help="a peer's kernels beside ours, counted the same way")
    add("--peers", metavar="DIR", default="build/peers", help="where the peer is installed")
    add("--json", metavar="PATH", help="write the records there")
    add("--cache", metavar="DIR", default="build/codegen", help="compiled code is kept there")
    add("--jobs", type=int, default=min(2, machine.usable_cores()), help="processes")


def run(args):
    need("rich")
    if args.jobs < 1:
        raise UserError(f"--jobs: expected at least 1, got {args.jobs}")
    backends = args.backend or BACKENDS
    if "triton" in backends or args.peer:
        need("triton")
    for name in args.backend or ():
        if name != "triton":
            toolchains.need(name)
    path = writable_file(args.json) if args.json else None
    folder = writable_folder(args.cache).absolute()
    from rich.console import Console

    from . import table

    console = Console(width=None if Console().is_terminal else 200)
    with interrupts.raised(), console.status("compiling"):
        targets = args.target or list(CHIPS)
        ours, theirs, absent = _collect(args, backends, targets, folder)
        executed = _executed(args, backends, targets, absent)
    if not ours and not theirs:
        raise UserError("no launch matches --backend, --kernel, --target and --dtype")
    table.show(console, ours, theirs, absent)
    if executed:
        console.print(table.executed(executed))
    broken = [(r, text) for r in ours for text in violations(r)]
    table.show_violations(console, ours, broken)
    if path:
        path.write_text(json.dumps(_json(ours, theirs, absent, executed), indent=1) + "\n")
        console.print(f"records: {path}")
    return 1 if broken else 0


def _collect(args, backends, targets, folder: Path):
    """Our records, the peer's records, and the targets without a compiler here."""
    from functools import partial

    from . import collect, native, peers

    def keep(work):
        return (not args.kernel or args.kernel in work.kernel) and (
            not args.dtype or work.dtype is None or work.dtype in args.dtype
        )

    ours, theirs, absent = [], [], []
    with_triton = [target for target in targets if target in TRITON]
    # Triton first: it forks, and a fork is only safe before any thread has started.
    if "triton" in backends:
        source = partial(_ours, options=args.options)
        ours += collect.records(source, with_triton, keep, folder, args.jobs)
    if args.peer:
        dtypes = tuple(args.dtype or DTYPES)
        liger = partial(peers.launches, folder=str(Path(args.peers).absolute()), dtypes=dtypes)
        theirs = collect.records(liger, with_triton, lambda work: True, folder, args.jobs)
    for backend in (b for b in BACKENDS if b in backends and b != "triton"):
        made, missing = native.records(
            backend,
            targets,
            lambda one: keep(one) and (args.options or one.plain),
            folder,
            args.jobs,
        )
        ours += made
        absent += missing
    return sorted(ours, key=_place), theirs, absent


def _executed(args, backends, targets, absent):
    if not args.executed:
        return []
    from . import executed

    missing = {(one["backend"], one["target"]) for one in absent}
    there = [b for b in backends if (b, "sm_90") not in missing]
    return executed.records(there, [one for one in targets if one in TRITON], args.dtype or DTYPES)


def _ours(target, options):
    from .collect import ours

    return ours(target, options)


def _place(record):
    """Sort key that puts comparable records of one chip next to each other."""
    from .table import is_plain

    has_options = bool(record["pass"]) and not is_plain(record)
    return (
        list(CHIPS).index(record["target"]),
        ("statistics", "gradient", "one read", "rescaling", None).index(record["pass"]),
        record["kernel"],
        record["dtype"] and DTYPES.index(record["dtype"]),
        has_options,
        record["name"] if has_options else "",
        record["columns"] or float("inf"),
        BACKENDS.index(record["backend"]),
    )


def _json(ours, theirs, absent, executed):
    return {
        "machine": machine.describe("codegen", machine.arguments()),
        "note": "predicted figures are rooflines of counted bytes and instructions, not timings",
        "records": [{**r, "violations": violations(r)} for r in ours],
        "peer": theirs,
        "not_compiled": absent,
        "executed": executed,
    }

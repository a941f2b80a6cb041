"""`python -m bench codegen`: registers, memory traffic and instructions of the compiled kernels."""

import json
from pathlib import Path

from .. import interrupts, machine
from ..errors import UserError, need, writable_file, writable_folder
from .audit import violations
from .chips import CHIPS

DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser):
    add = parser.add_argument
    add("--kernel", metavar="NAME", help="only kernels whose name holds this")
    add("--target", action="append", choices=tuple(CHIPS), help="only these; may be repeated")
    add("--dtype", action="append", choices=DTYPES, help="of the logits; may be repeated")
    add("--options", action="store_true", help="also softcap, smoothing, metrics, unaligned rows")
    add("--peer", choices=("liger",), help="a peer's kernels beside ours, counted the same way")
    add("--peers", metavar="DIR", default="build/peers", help="where the peer is installed")
    add("--json", metavar="PATH", help="write the records there")
    add("--cache", metavar="DIR", default="build/codegen", help="compiled code is kept there")
    add("--jobs", type=int, default=min(2, machine.usable_cores()), help="processes")


def run(args):
    need("rich")
    need("triton")
    if args.jobs < 1:
        raise UserError(f"--jobs: expected at least 1, got {args.jobs}")
    path = writable_file(args.json) if args.json else None
    folder = writable_folder(args.cache).absolute()
    targets = args.target or list(CHIPS)
    from rich.console import Console

    from . import table

    console = Console(width=None if Console().is_terminal else 160)
    with interrupts.raised(), console.status("compiling"):
        ours, theirs = _collect(args, targets, folder)
    if not ours and not theirs:
        raise UserError("no launch matches --kernel, --target and --dtype")
    table.show(console, ours, theirs)
    broken = [(r, text) for r in ours for text in violations(r)]
    table.show_violations(console, ours, broken)
    if path:
        path.write_text(json.dumps(_json(ours, theirs), indent=1) + "\n")
        console.print(f"records: {path}")
    return 1 if broken else 0


def _collect(args, targets, folder: Path):
    from functools import partial

    from . import collect, peers

    def keep(work):
        return (not args.kernel or args.kernel in work.kernel) and (
            not args.dtype or work.dtype is None or work.dtype in args.dtype
        )

    source = partial(_ours, options=args.options)
    ours = collect.records(source, targets, keep, folder, args.jobs)
    theirs = []
    if args.peer:
        dtypes = tuple(args.dtype or DTYPES)
        liger = partial(peers.launches, folder=str(Path(args.peers).absolute()), dtypes=dtypes)
        theirs = collect.records(liger, targets, lambda work: True, folder, args.jobs)
    return ours, theirs


def _ours(target, options):
    from .collect import ours

    return ours(target, options)


def _json(ours, theirs):
    return {
        "machine": machine.describe("codegen", machine.arguments()),
        "note": "predicted figures are rooflines of counted bytes and instructions, not timings",
        "records": [{**r, "violations": violations(r)} for r in ours],
        "peer": theirs,
    }

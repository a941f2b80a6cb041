"""The `linear` command: arguments, the run, and the output of the record."""

from functools import partial

from .. import machine
from ..errors import UserError, writable_file, writable_folder
from ..kernels.cases import DTYPES
from ..kernels.command import STOP_HELP, device_slug, device_type, expect
from ..kernels.timing import FEWEST

#: rows, hidden, vocabulary without --rows, --hidden and --vocab, by device type: a CPU measures all
#: providers in a minute.
SIZES = {"cpu": (256, 512, 16384), "cuda": (8192, 4096, 131072)}
FOLDER = "linear"  # inside --results, whose own files are records of `bench kernels`


def add_arguments(parser):
    add = parser.add_argument
    add("--rows", type=int, help="hidden states; default: 256 on a CPU, 8192 on a GPU")
    add("--hidden", type=int, help="their size; default: 512 on a CPU, 4096 on a GPU")
    add("--vocab", type=int, help="default: 16384 on a CPU, 131072 on a GPU")
    add("--scored", nargs="+", type=float, default=[1.0, 0.3], help="scored parts of the rows")
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16"], help="of hidden and weight")
    add("--chunk-rows", type=int, help="of a chunk; default: each provider's own choice")
    add("--provider", nargs="+", default=[], metavar="NAME", help="default: all")
    add("--without", nargs="+", default=[], metavar="NAME", help="leave these providers out")
    add("--device", choices=tuple(SIZES), help="default: a GPU if there is one")
    add("--seconds", type=float, default=0.4, help=f"to time a row, {FEWEST} times at least")
    add("--stop", type=float, metavar="SECONDS", help=STOP_HELP)
    add("--limit", type=float, default=60.0, help=LIMIT_HELP)
    add("--seed", type=int, default=0)
    add("--json", metavar="PATH", help="write the record there, row by row")
    add("--results", metavar="DIR", help=f"write the record to DIR/{FOLDER}/<device>.json")


LIMIT_HELP = (
    "seconds: on a CPU, leave a provider out if its matrix products are predicted to take longer"
)


def run(args):
    from ..kernels.measuring import measure
    from ..kernels.providers import select
    from ..kernels.record import Rows
    from . import record, table, worker
    from .providers import PROVIDERS

    device = device_type(args.device)
    left_out = select(args.without, PROVIDERS) if args.without else []
    chosen = [one for one in select(args.provider, PROVIDERS) if one not in left_out]
    expect(chosen, "--without", "to leave a provider", " ".join(args.without))
    cases = _cases(args, device)
    path = _output(args, device)
    rows = Rows(cases, "full")
    rows.add_all(chosen, device)
    described = machine.describe("linear", machine.arguments(), device)
    settings = {key: value for key, value in vars(args).items() if key != "command"}
    build = partial(record.build, rows, described, settings, device)
    threads = described["threads"]
    done = measure(rows, chosen, device, threads, args.seconds, build, path, worker, args.stop)
    table.show(done)
    if path:
        from ..kernels.table import show_files

        show_files([path])
    return table.verdict(done)


def _cases(args, device):
    from .case import Case

    sizes = dict(zip(("rows", "hidden", "vocab"), SIZES[device], strict=True))
    for name in sizes:
        asked = getattr(args, name)
        least = 2 if name == "rows" else 1
        expect(asked is None or asked >= least, f"--{name}", f"at least {least}", asked)
        sizes[name] = asked or sizes[name]
    chunk = args.chunk_rows
    expect(chunk is None or chunk > 0, "--chunk-rows", "a positive number", chunk)
    for scored in args.scored:
        expect(0 < scored <= 1, "--scored", "parts above 0, up to 1", scored)
    cases = [
        Case(
            **sizes,
            scored=scored,
            dtype=dtype,
            chunk_rows=chunk,
            limit=args.limit,
            seed=args.seed,
        )
        for dtype in args.dtype
        for scored in args.scored
    ]
    for case in cases:
        expect(case.scored_rows, "--scored", f"a part of {case.rows} rows", case.scored)
        _must_fit(case, device)
    return cases


def _must_fit(case, device):
    """Raise UserError if a case does not fit into the free memory."""
    from ..kernels.command import free_memory

    # Bare products: logits, weight, its gradient; full logits: they, and the loss's fp32 copies.
    numbers = (case.rows + 2 * case.hidden) * case.vocab
    needed, free = 4 * numbers + 4 * case.rows * case.vocab * 3, free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"{case.name}: expected {needed / 2**20:.0f} MiB free, got {free / 2**20:.0f} MiB; "
            "choose a smaller --rows, --hidden or --vocab"
        )


def _output(args, device):
    """The record's path, which can be written; None if no record is asked for."""
    if args.json:
        return writable_file(args.json)
    if not args.results:
        return None
    folder = writable_folder(writable_folder(args.results) / FOLDER)
    return writable_file(folder / f"{device_slug(device)}.json")

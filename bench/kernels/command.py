"""The `kernels` command: arguments, sizes, the run, and the output of the record."""

import re
from functools import partial
from pathlib import Path

import torch

from fused_sft_loss.backends import devices

from .. import machine
from ..clock import LEAD_BYTES
from ..errors import UserError, need, writable_file, writable_folder
from .cases import (
    BATCH,
    DEGREES,
    DTYPES,
    MODELS,
    MODES,
    Model,
    fit,
    model_case,
    must_fit,
    wanted_bytes,
)
from .timing import FEWEST

SCRATCH = 2**28  # the oracle's tiles, the interpreter, the libraries
KEPT_FREE = 0.15  # part of the free memory that stays unused


def add_arguments(parser):
    add = parser.add_argument
    add("--model", nargs="+", default=None, metavar="NAME", help=f"{', '.join(MODELS)}, or all")
    add("--shape", action="append", metavar="B,S,V", help="logits of your own; may be repeated")
    add("--tp", nargs="+", type=int, default=[1], metavar="N", help="1, 2, 4 or 8")
    add("--nproc", type=int, default=1, metavar="N", help=NPROC_HELP)
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16"], help="of the logits")
    add("--scored", nargs="+", type=float, default=[1.0, 0.3], help="scored parts of the rows")
    add("--mode", choices=MODES, default="full", help="what is timed; bwd alone after its fwd")
    add("--provider", nargs="+", default=[], metavar="NAME", help="default: all; see --list")
    add("--without", nargs="+", default=[], metavar="NAME", help="leave these providers out")
    add("--device", choices=("cpu", "cuda"), default=None, help="default: a GPU if there is one")
    add("--seconds", type=float, default=0.4, help=f"to time a row, {FEWEST} times at least")
    add("--stop", type=float, metavar="SECONDS", help=STOP_HELP)
    add("--seed", type=int, default=0)
    add("--json", metavar="PATH", help="write the record there, row by row")
    add("--csv", metavar="PATH", help="write the rows there")
    add("--plot", metavar="PATH", help="draw the rows there, .svg or .png")
    add("--results", metavar="DIR", help="write the record to DIR/<device>.json")
    add("--compare", metavar="OLD.json", help="add a column of changes since that record")
    add("--list", action="store_true", help="list models and providers, and measure nothing")
    add("--dry-run", action="store_true", help="print cases and predicted memory only")


NPROC_HELP = (
    "processes there are to shard over: cases of --tp up to it run on that many, others as the "
    "shard of one rank; 0: as many as there are GPUs, or cores"
)

STOP_HELP = (
    "begin with no row after this time: those that were checked are timed, the others stay pending"
)


def run(args):
    from . import providers as provider_table
    from . import record, table

    device = _device(args)
    left_out = provider_table.select(args.without) if args.without else []
    chosen = [p for p in provider_table.select(args.provider) if p not in left_out]
    expect(chosen, "--without", "to leave a provider", " ".join(args.without))
    cases = _cases(args, device, chosen)
    if args.list:
        return table.show_list(MODELS, chosen, cases[0], device)
    if args.dry_run:
        needed, free = partial(needed_bytes, device=device, providers=chosen), free_memory(device)
        return table.show_predictions(cases, chosen, device, needed, free)
    old = record.read(args.compare) if args.compare else None
    outputs = _outputs(args, device)
    done = _measure(args, cases, chosen, device, outputs)
    if old:
        record.compare(done, old)
    table.show(done, old)
    if outputs["csv"]:
        record.write_csv(done, outputs["csv"])
    if outputs["json"]:
        record.write(done, outputs["json"])
    if outputs["plot"]:
        from . import plots

        plots.draw(done, outputs["plot"])
    table.show_files(path for path in outputs.values() if path)
    return table.verdict(done)


def device_type(asked):
    """The device type to measure: the one that is asked for, or None for the default."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: expected a GPU that torch can use, got none; see torch.cuda"
        )
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _device(args):
    device = device_type(args.device)
    expect(args.nproc >= 0, "--nproc", "a number of processes, or 0", args.nproc)
    if device == "cuda":
        there = torch.cuda.device_count()
        expect(args.nproc <= there, "--nproc", f"at most {there}, the GPUs here", args.nproc)
    else:
        there = machine.usable_cores()
    args.nproc = args.nproc or there
    return device


def _outputs(args, device):
    """{kind of output: a path that can be written, or None if it is not requested}."""
    paths = {"json": args.json, "csv": args.csv, "plot": args.plot}
    if args.results:
        folder = writable_folder(args.results)
        paths["json"] = paths["json"] or folder / f"{device_slug(device)}.json"
    if paths["plot"]:
        need("matplotlib")
        if Path(paths["plot"]).suffix not in (".svg", ".png"):
            raise UserError(f"--plot: expected a name in .svg or .png, got {paths['plot']}")
    return {kind: writable_file(path) if path else None for kind, path in paths.items()}


def device_slug(device):
    """A file name for this kind of device. Without amdgpu.ids, ROCm knows no name of an AMD GPU."""
    name = "cpu"
    if device == "cuda":
        name = (
            torch.cuda.get_device_name().strip()
            or f"gpu {devices.architecture(0).partition(':')[0]}"
        )
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _cases(args, device, chosen):
    """All requested combinations, sized to the free memory."""
    for value in args.tp:
        expect(value in DEGREES, "--tp", f"some of {DEGREES}", value)
    for value in args.scored:
        expect(0 < value <= 1, "--scored", "parts above 0, up to 1", value)
    needed, free = partial(needed_bytes, device=device, providers=chosen), free_memory(device)
    cores, cases = machine.usable_cores(), []
    for model, shape in _models(args):
        for tp in args.tp:
            nproc = tp if tp <= args.nproc else 1
            for dtype in args.dtype:
                batch = shape[0] if shape else BATCH
                make = partial(_make, model, tp, nproc, dtype, args.seed, batch)
                if shape:
                    sized = make(shape[1])
                    must_fit(sized, free, needed)
                else:
                    row_bytes = make(1).logits_bytes / batch
                    wanted = wanted_bytes(device, machine.cache(device), cores, row_bytes)
                    sized = fit(make, wanted / (nproc if device == "cpu" else 1), free, needed)
                cases += [make(sized.seq, scored) for scored in args.scored]
    return cases


def _make(model, tp, nproc, dtype, seed, batch, seq, scored=1.0):
    return model_case(model, tp, nproc, batch, seq, dtype, scored, seed)


def _models(args):
    """[(Model, (b, s) or None)]."""
    names = args.model if args.model or args.shape else ["llama3-8b"]
    names = list(MODELS) if names == ["all"] else names or []
    for name in names:
        expect(name in MODELS, "--model", f"some of {', '.join(MODELS)}, or all", name)
    found = [(MODELS[name], None) for name in names]
    for shape in args.shape or ():
        try:
            batch, seq, vocab = (int(part) for part in shape.split(","))
        except ValueError:
            batch = seq = vocab = 0
        fine = batch > 0 and seq > 1 and vocab > 0
        expect(fine, "--shape", "three positive numbers b,s,v with s > 1", shape)
        found.append((Model("custom", vocab, vocab), (batch, seq)))
    return found


def needed_bytes(case, device, providers):
    """Predicted bytes to measure a case: inputs, copies, oracle, and the largest provider's peak.

    On a CPU it is the sum over all processes of the case.
    """
    # The source, its ring of copies, the roof's target, a gradient; and the oracle's fp32 gradient.
    ring = 2 * case.logits_bytes + (machine.cache(device) or 0)
    logits, answer = 3 * case.logits_bytes + ring, 4 * case.rows * case.columns
    able = [p for p in providers if p.reason_against(case, device) is None]
    peak = max((max(p.predicted_bytes(case)) for p in able), default=0)
    if device == "cuda":
        return logits + answer + peak + SCRATCH + LEAD_BYTES
    return (logits + answer + peak + SCRATCH) * case.nproc


def free_memory(device):
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else machine.free_memory()
    return None if free is None else int(free * (1 - KEPT_FREE))


def _measure(args, cases, chosen, device, outputs):
    """Measure, and return the record. An interrupt first writes the JSON of the finished rows."""
    from . import record
    from .measuring import measure

    rows = record.Rows(cases, args.mode)
    rows.add_all(chosen, device)
    described = machine.describe("kernels", machine.arguments(), device)
    settings = {key: value for key, value in vars(args).items() if key != "command"}
    build = partial(record.build, rows, described, settings)
    threads = described["threads"]
    path, seconds = outputs["json"], args.seconds
    return measure(rows, chosen, device, threads, seconds, build, path, stop=args.stop)


def expect(holds, name, expected, got):
    if not holds:
        raise UserError(f"{name}: expected {expected}, got {got}")

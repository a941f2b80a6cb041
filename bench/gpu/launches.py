"""`python -m bench launches`: other lines of the launch tables, timed beside the table's own.

For Triton these are the candidates of FUSED_SFT_LOSS_AUTOTUNE. For CUDA and HIP they are threads
and segments of csrc/gpu/launch_table.h, which a build in a checkout can try without compiling. The
lines of a kernel are interleaved, and each result is compared with that of the table's line.
"""

from functools import partial
from itertools import product

from .. import interrupts, machine
from ..errors import UserError, writable_file
from ..kernels import record as kernels_record
from ..kernels import timing
from ..kernels.cases import BATCH, GPU_ROWS, MODELS, model_case
from ..kernels.command import device_type
from ..kernels.problem import Problem, Source
from ..kernels.worker import failed
from . import lines

#: (model, TP of the shard), most wanted first: plain, softcapped, narrow, a shard.
WIDTHS = (("mistral-nemo", 1), ("gemma2", 1), ("gpt2", 1), ("llama3-8b", 8))
CPU_WIDTHS = (("gpt2", 8),)
CPU_ROWS = 4
GAIN = 0.03  # a smaller one is noise


def add_arguments(parser):
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    add("--backend", nargs="+", default=[], help="default: all that can run")
    add("--seconds", type=float, default=0.02, help="to time a line")
    add("--json", metavar="PATH", help="write the record there, row by row")


def run(args):
    device = device_type(args.device)
    backends = lines.backends(device)
    unknown = [name for name in args.backend if name not in backends]
    if unknown or not backends:
        names = ", ".join(backends) or "none"
        raise UserError(f"--backend: expected some of those that can run here ({names}), got "
                        f"{', '.join(unknown) or 'none'}")  # fmt: skip
    chosen = {name: backends[name] for name in args.backend or backends}
    path = writable_file(args.json) if args.json else None
    rows, finished = [], False
    described = machine.describe("launches", machine.arguments(), device)

    def save():
        if path:
            settings = {key: value for key, value in vars(args).items() if key != "command"}
            head = {"schema": kernels_record.SCHEMA, "finished": finished, "machine": described}
            kernels_record.write({**head, "settings": settings, "cases": [], "rows": rows}, path)

    with interrupts.raised():
        try:
            for row in measured(chosen, device, args.seconds):
                rows.append(row)
                print(sentence(row), flush=True)
                save()
            finished = True
        finally:
            save()
    return int(any(row["status"] == "wrong" for row in rows))


def measured(backends, device, seconds):
    """Yield a row for each kernel of each width, backend by backend.

    The compiled backend is first: it tries a line in a tenth of a second, and Triton compiles it.
    """
    widths, count = (WIDTHS, GPU_ROWS) if device == "cuda" else (CPU_WIDTHS, CPU_ROWS)
    for (name, backend), (model, tp) in product(backends.items(), widths):
        case = model_case(MODELS[model], tp, 1, BATCH, count // BATCH, "bf16", 1.0, 0)
        work = lines.Work(backend.kernels, Problem(case, Source(case.source, device, copies=1)))
        for kernel in backend.uses(work):
            yield _row(name, backend, kernel, work, seconds)


def _row(name, backend, kernel, work, seconds):
    """Time the candidates of a kernel; the first is the table's line."""
    case, found = work.case, {}
    candidates = list(backend.candidates(kernel, case))
    exact, contenders = None, []
    for line in candidates:
        try:
            with backend.trying(kernel, line):
                result = work.result(kernel)
        except Exception as error:  # the device refuses such a launch
            found[line] = failed(error)
            continue
        exact = result if exact is None else exact
        if not work.same(kernel, result, exact):
            reason = "is not finite" if result is exact else "is not that of the table's line"
            found[line] = {"status": "wrong", "reason": f"its result {reason}"}
            continue
        contenders.append(timing.Contender(line, partial(_timed, backend, kernel, line, work)))
    del exact
    found |= dict(timing.rounds(contenders, work.device, False, seconds, failed))
    for contender in contenders:
        if contender.seconds:
            ms = sorted(kernels_record.total(contender.seconds))[len(contender.seconds) // 2] * 1e3
            found[contender.name] = {"status": "ok", "reason": None, "ms": ms}
    where = {"backend": name, "kernel": kernel, "model": case.model, "columns": case.columns}
    return {**where, "softcap": case.softcap, **summary(candidates, found)}


def _timed(backend, kernel, line, work, clock):
    with backend.trying(kernel, line):
        clock.start()
        work.run(kernel)
        clock.mark()
        clock.mark()


def summary(candidates, found):
    """What a search over the lines would change. `found`: {line: status, reason, ms}."""
    table = found[candidates[0]]
    right = {line: one["ms"] for line, one in found.items() if one["status"] == "ok"}
    wrong = [line for line, one in found.items() if one["status"] == "wrong"]
    out = {"status": "ok", "reason": None, "table": str(candidates[0]), "table_ms": table.get("ms")}
    out |= {"best": None, "best_ms": None, "gain": None}
    out["lines"] = {str(line): one.get("ms") or one["reason"] for line, one in found.items()}
    if wrong or table["status"] != "ok":
        line = wrong[0] if wrong else candidates[0]
        return {**out, "status": "wrong", "reason": f"{line}: {found[line]['reason']}"}
    best = min(right, key=right.get)
    gain = 1 - right[best] / right[candidates[0]]
    return {**out, "best": str(best), "best_ms": right[best], "gain": gain}


def sentence(row):
    where = f"{row['backend']} {row['kernel']}, {row['model']} {row['columns']} columns"
    if row["status"] != "ok":
        return f"{where}: {row['status']}: {row['reason']}"
    text = f"{where}: {row['table_ms']:.3f} ms with the table's {row['table']}"
    if row["gain"] < GAIN:
        return f"{text}; none of {len(row['lines']) - 1} other lines is {GAIN:.0%} faster"
    return f"{text}; {row['best_ms']:.3f} ms ({-row['gain']:.0%}) with {row['best']}"

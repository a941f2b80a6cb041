"""python -m bench cpu: what the loss costs on this machine's CPU, beside copying its logits once.

Every contender computes the loss and the gradient of the same [b, s, V] logits, with an upstream
gradient that is not 1. All are timed in turn, round after round in one run, so that a busy moment
of the machine hits all alike; the medians are reported. Before each timing the logits are written
anew and the last-level cache is filled with other data, both outside the timed region. Memory comes
from one more run of each, beyond the logits, as multiples of their bytes.
"""

import json
import statistics
import time
from dataclasses import dataclass, field

import torch

from . import interrupts, machine
from .errors import UserError, need, writable_file
from .memory import MemoryRecord
from .reference import reference_loss

UPSTREAM = 0.37
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Contender:
    """`loss(logits, labels, mask)` is timed forward and backward; None: the plain copy."""

    name: str
    loss: object
    mask: torch.Tensor | None = None
    forward: list = field(default_factory=list)  # seconds
    backward: list = field(default_factory=list)
    peak: float | None = None  # allocated bytes / the logits' bytes
    resident_peak: float | None = None
    loss_error: float | None = None  # relative to the reference's
    grad_error: float | None = None  # largest difference / largest gradient, to the reference's

    @property
    def total(self):
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


def add_arguments(parser):
    parser.add_argument("--rows", type=int, default=512, help="positions, b*s")
    parser.add_argument("--batch", type=int, default=2, help="sequences, b")
    parser.add_argument("--vocab", type=int, default=131072, help="vocabulary size")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the logits")
    parser.add_argument(
        "--scored", type=float, default=0.3, help="part of rows that one run scores"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timings of each contender")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", metavar="PATH", help="write the record there")


def run(args):
    need("rich")
    if args.rows % args.batch or args.rows // args.batch < 2:
        raise UserError(
            f"--rows: expected a multiple of --batch {args.batch}, at least twice it, "
            f"got {args.rows}"
        )
    path = writable_file(args.json) if args.json else None
    case = Case(args)
    contenders = _contenders(case, args)
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 120)
    with interrupts.raised(), console.status("warming up") as status:
        for contender in contenders:
            status.update(f"checking {contender.name}")
            _check(case, contender)
        for step in range(args.rounds):
            status.update(f"timing, round {step + 1} of {args.rounds}")
            for contender in contenders:
                forward, backward = case.time(contender)
                contender.forward.append(forward)
                contender.backward.append(backward)
    record = _record(case, contenders, args)
    console.print(_table(record))
    if path:
        path.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"record: {path}")


class Case:
    """The logits, where they are restored from, and what fills the cache in between."""

    def __init__(self, args):
        torch.manual_seed(args.seed)
        b, s = args.batch, args.rows // args.batch
        dtype = DTYPES[args.dtype]
        self.source = torch.randn(b, s, args.vocab).mul_(4).to(dtype)
        self.memory = torch.empty_like(self.source)
        self.labels = torch.randint(0, args.vocab, (b, s))
        self.everything = torch.ones(b, s)
        # A prompt, then a response: the scored fraction at the end of every sequence.
        self.some = torch.zeros(b, s)
        self.some[:, s - round(s * args.scored) :] = 1.0
        self.bytes = self.source.numel() * self.source.element_size()
        self.scratch = torch.empty(2 * (machine.last_level_cache() or 2**26), dtype=torch.uint8)
        self.upstream = torch.tensor(UPSTREAM)

    def restore(self):
        """Fresh logits [b, s, V], a non-leaf that shares `memory`, none of it in the cache."""
        self.memory.copy_(self.source)
        self.scratch.fill_(1)
        leaf = self.memory.detach().requires_grad_()
        return leaf.view_as(leaf)  # in-place backward refuses a leaf; a view costs nothing

    def time(self, contender):
        """Seconds of (forward, backward); of (copy, nothing) for the copy."""
        if contender.loss is None:
            target = self.restore().detach()
            start = time.perf_counter()
            target.copy_(self.source)
            return time.perf_counter() - start, 0.0
        logits = self.restore()
        start = time.perf_counter()
        loss = contender.loss(logits, self.labels, contender.mask)
        middle = time.perf_counter()
        grad = torch.autograd.grad(loss, logits, self.upstream)
        end = time.perf_counter()
        del grad
        return middle - start, end - middle

    def result(self, contender):
        """(loss, gradient [b, s, V]) of a contender, and the memory it took, a Usage."""
        with MemoryRecord() as record:
            logits = self.restore()
            record.mark("begin")
            loss = contender.loss(logits, self.labels, contender.mask)
            (grad,) = torch.autograd.grad(loss, logits, self.upstream)
            record.mark("end")
        return loss.item(), grad, record.usage("begin", "end")


def _contenders(case, args):
    from fused_sft_loss import sft_loss

    def inplace(logits, labels, mask):
        return sft_loss(logits, labels, mask, inplace_backward=True)

    masked = f"ours, in place, {args.scored:.0%} scored"
    contenders = [
        Contender("copy_ of the logits", None),
        Contender("ours, in place", inplace, case.everything),
        Contender("ours, new gradient", sft_loss, case.everything),
        Contender(masked, inplace, case.some),
        Contender("reference", reference_loss, case.everything),
    ]
    if not args.no_compile:
        compiled = torch.compile(reference_loss, fullgraph=True)
        contenders.append(Contender("torch.compile(reference)", compiled, case.everything))
    return contenders


def _check(case, contender):
    """Fill in memory and the differences from the reference; also the warm-up."""
    if contender.loss is None:
        case.time(contender)
        return
    case.time(contender)  # compiles, starts threads, fills caches of the library's own
    loss, grad, usage = case.result(contender)
    grad = grad.clone()  # the next run writes over the memory of an in-place one
    wanted, wanted_grad, _ = case.result(Contender("", reference_loss, contender.mask))
    contender.loss_error = abs(loss - wanted) / abs(wanted)
    scale = wanted_grad.abs().max().item()
    contender.grad_error = (grad - wanted_grad).abs().max().item() / scale
    contender.peak = usage.peak / case.bytes
    if usage.resident_peak is not None:
        contender.resident_peak = usage.resident_peak / case.bytes


def _record(case, contenders, args):
    rows = []
    for c in contenders:
        forward, backward, total = map(statistics.median, (c.forward, c.backward, c.total))
        rows.append(
            {
                "name": c.name,
                "forward_ms": forward * 1e3,
                "backward_ms": backward * 1e3,
                "total_ms": total * 1e3,
                "fastest_ms": min(c.total) * 1e3,
                "peak_x_logits": c.peak,
                "resident_peak_x_logits": c.resident_peak,
                "loss_relative_difference": c.loss_error,
                "gradient_relative_difference": c.grad_error,
                "scored_rows": None if c.mask is None else int(c.mask[:, 1:].count_nonzero()),
                "samples_ms": [t * 1e3 for t in c.total],
            }
        )
    keys = ("rows", "batch", "vocab", "dtype", "scored", "rounds", "seed")
    return {
        "machine": machine.describe("cpu", machine.arguments()),
        "case": {**{key: getattr(args, key) for key in keys}, "upstream_gradient": UPSTREAM},
        "logits_bytes": case.bytes,
        "contenders": rows,
    }


def _table(record):
    from rich.table import Table

    case, rows = record["case"], record["contenders"]
    copy, ours = rows[0]["total_ms"], rows[1]["total_ms"]
    title = "{rows} rows x {vocab} {dtype}, forward + backward, median of {rounds}".format(**case)
    caption = (
        "ms: both, and the ratios are of it; peak: bytes beyond the logits / theirs; "
        "differ by: loss and gradient, relative to the reference's"
    )
    table = Table(title=f"{title}, {record['machine']['threads']} threads", caption=caption)
    table.add_column("")
    for name in ("forward", "backward", "ms", "fastest", "x copy_", "x ours", "peak", "differ by"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        error = row["loss_relative_difference"]
        agree = "" if error is None else f"{error:.0e}, {row['gradient_relative_difference']:.0e}"
        peak = "" if row["peak_x_logits"] is None else f"{row['peak_x_logits']:.3f}"
        times = [
            f"{row[key]:.2f}" for key in ("forward_ms", "backward_ms", "total_ms", "fastest_ms")
        ]
        ratios = [f"{row['total_ms'] / copy:.2f}", f"{row['total_ms'] / ours:.2f}"]
        table.add_row(row["name"], *times, *ratios, peak, agree)
    return table

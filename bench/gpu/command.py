"""The `gpu` command: looks for the GPU, runs the parts within a budget, and gives a verdict.

It needs a Python with torch, and this source tree. A part that needs more is skipped, and says
what to install. Nothing is downloaded.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time

from .. import interrupts
from ..errors import UserError, writable_folder
from . import runner
from .found import ROOT, Found

LOOK_S = 90.0  # the first start of CUDA takes a while


def add_arguments(parser):
    add = parser.add_argument
    add("--budget", type=float, default=runner.BUDGET, help="seconds for everything")
    add("--only", nargs="+", default=[], metavar="PART", help="of the names that --list prints")
    add("--out", default="bench-out/gpu", metavar="DIR", help="for record, page and logs")
    add("--list", action="store_true", help="print the parts and their commands, and run nothing")
    add("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)  # rehearsal


def run(args):
    if args.budget <= 0:
        raise UserError(f"--budget: expected a number of seconds above 0, got {args.budget:g}")
    folder = writable_folder(args.out).absolute()
    with interrupts.raised(*_signals_of_an_end()):
        return _run(args, folder)


def _signals_of_an_end():
    """A batch system's, and that of a closed terminal unless nohup ignores it.

    A part is a session of its own: it would go on alone.
    """
    closed = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGHUP) if closed else (signal.SIGTERM,)


def _run(args, folder):
    begun = time.monotonic()
    found = look(args.device)
    for line in found.lines:
        print(line)
    if found.device is None and not args.list:
        print(f"verdict: no GPU: nothing was checked ({found.why})")
        return 1
    from . import parts

    chosen = _chosen(parts.all_parts(found, folder), args.only)
    if args.list:
        for part in chosen:
            print(f"{part.name:18s} {part.title}\n    {part.skip or shlex.join(part.command)}")
        return 0
    for name in ("parts", "logs", "linear", "launches"):
        (folder / name).mkdir(exist_ok=True)
    from .record import Written

    command = shlex.join(["python", "-m", "bench", "gpu", *sys.argv[2:]])
    written = Written(found, folder, command)
    left = max(args.budget - (time.monotonic() - begun), 1.0)
    running = runner.Runner(folder / "logs", left, written, ROOT)
    results = running.run(chosen)
    return _finish(results, running.interrupted, written)


def _finish(results, interrupted, written):
    written(results, interrupted)
    status, last = runner.verdict(results, interrupted)
    print("", *(result.line for result in results), sep="\n")
    for result in results:
        if result.status == runner.FAILED and result.log:
            print(f"log of {result.title}: {result.log}")
    for path in written.files():
        print(f"written: {path}")
    print(last)
    return status


def look(device):
    """Found, asked in another process. Without torch, or if it hangs, there is no device."""
    command = [sys.executable, "-m", "bench.gpu.found", device]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LOOK_S)
    except subprocess.TimeoutExpired:
        return Found(why=f"torch did not answer within {LOOK_S:.0f} s; is the driver working?")
    if done.returncode:
        return Found(why=f"{sys.executable}: {runner.last_line(done.stderr)}")
    return Found(**json.loads(done.stdout.splitlines()[-1]))


def _chosen(parts, names):
    known = [part.name for part in parts]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--only: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return [part for part in parts if not names or part.name in names]

"""Runs parts one after the other, each in its own process with a limit, within a budget of time."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

PASSED, FAILED, SKIPPED = "PASSED", "FAILED", "SKIPPED"
BUDGET = 600.0  # seconds; the limits of parts are written for it
SHORTEST = 10.0  # of BUDGET: a part that would get less does not start
#: Of a part's time: then a benchmark begins with no row, times those that it has checked, and
#: records their memory. Compiling a peer may take half a minute, and is not interrupted.
BEGINNING = 0.55
GRACE_S = 15.0  # after an interrupt: the time in which a part may write what it has


@dataclass(frozen=True)
class Ended:
    """How a part's process ended.

    status   its exit status
    late     it reached its limit and was interrupted
    seconds  how long it ran
    log      the file with its output
    """

    status: int
    late: bool
    seconds: float
    log: Path

    @property
    def text(self):
        return self.log.read_text(encoding="utf-8", errors="replace")


def by_status(ended):
    """(status, text) of a part that says everything with its exit status."""
    if ended.late:
        return FAILED, f"not finished after {ended.seconds:.0f} s"
    if ended.status:
        return FAILED, last_line(ended.text) or f"exit status {ended.status}"
    return PASSED, ""


def last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


@dataclass(frozen=True)
class Part:
    """A check or a measurement.

    name      of its files, and for --only
    command   argv
    limit     seconds of BUDGET that it may take
    least     seconds of BUDGET that earlier parts leave to it
    skip      why it cannot run, or None
    outcome   outcome(Ended) -> (PASSED, FAILED or SKIPPED; text)
    stop      the option of `command` that takes the seconds of BEGINNING, or None
    record    the file that `outcome` reads, or None. That of an earlier run is removed first, or a
              part that ends before it writes would be judged by it
    """

    name: str
    title: str
    command: list
    limit: float
    least: float = 0.0
    skip: str | None = None
    outcome: Callable = by_status
    environment: tuple = ()  # (variable, value)
    stop: str | None = None
    record: Path | None = None


@dataclass(frozen=True)
class Result:
    name: str
    title: str
    status: str
    text: str
    seconds: float = 0.0
    log: str | None = None

    @property
    def line(self):
        text = f": {self.text}" if self.text else ""
        return f"{self.status:7s} {self.title}, {self.seconds:.0f} s{text}"


class Runner:
    """`run(parts)` gives a Result for each, also if it is interrupted.

    save         called with the results so far after each part
    interrupted  the parts were stopped by a signal
    """

    def __init__(self, folder, budget=BUDGET, save=lambda results: None, root=None):
        self.folder, self.budget, self.save, self.root = Path(folder), budget, save, root
        self.scale = budget / BUDGET
        self.interrupted = False

    def run(self, parts):
        self.folder.mkdir(parents=True, exist_ok=True)
        results, deadline = [], time.monotonic() + self.budget
        for index, part in enumerate(parts):
            print(f"[{index + 1}/{len(parts)}] {part.title}", flush=True)
            try:
                later = sum(p.least for p in parts[index + 1 :] if not p.skip)
                result = self._one(part, deadline - time.monotonic(), later)
            except KeyboardInterrupt:
                self.interrupted = True
                result = _result(part, SKIPPED, "interrupted")
            results.append(result)
            print(f"  {result.line}", flush=True)
            self.save(results)
        return results

    def _one(self, part, left, later):
        if self.interrupted:
            return _result(part, SKIPPED, "interrupted")
        if part.skip:
            return _result(part, SKIPPED, part.skip)
        # The grace of the last part is within the budget too.
        allowed = min(part.limit * self.scale, left - (later + GRACE_S) * self.scale)
        if allowed < SHORTEST * self.scale:
            text = f"{max(left, 0.0):.0f} s of {self.budget:.0f} s are left; raise --budget"
            return _result(part, SKIPPED, text)
        if part.record:
            part.record.unlink(missing_ok=True)
        if part.stop:
            more = [part.stop, f"{BEGINNING * allowed:.0f}"]
            part = replace(part, command=[*part.command, *more])
        log = self.folder / f"{part.name}.log"
        ended, stopped = run_one(part, log, allowed, self.root)
        if stopped:
            self.interrupted = True
        status, text = part.outcome(ended)
        if stopped and status == FAILED:
            status, text = SKIPPED, "interrupted"
        return _result(part, status, text, ended.seconds, str(log))


def _result(part, status, text, seconds=0.0, log=None):
    return Result(part.name, part.title, status, text, seconds, log)


def run_one(part, log, limit, root=None):
    """(Ended, whether a signal stopped this process). Leaves no process behind."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(part.environment)}
    begin, late, stopped = time.monotonic(), False, False
    with open(log, "wb") as out:
        # In a session of its own, so that Ctrl-C reaches this process alone.
        process = subprocess.Popen(
            part.command,
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
        except KeyboardInterrupt:
            stopped = True
        finally:
            stopped = _end(process) or stopped
    seconds = time.monotonic() - begin
    return Ended(process.returncode, late or stopped, seconds, log), stopped


def _end(process):
    """Interrupt a process that runs, so that it keeps what it has; then kill its whole session.

    Returns whether a signal cut the grace short.
    """
    hurried = False
    try:
        if process.poll() is None:
            _signal(process, signal.SIGINT)
            process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    except KeyboardInterrupt:
        hurried = True
    _signal(process, signal.SIGKILL)
    process.wait()
    return hurried


def _signal(process, number):
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # all have ended
        pass


def verdict(results, interrupted=False):
    """(exit status, the last line)."""
    failed = [result.title for result in results if result.status == FAILED]
    passed = sum(result.status == PASSED for result in results)
    skipped = sum(result.status == SKIPPED for result in results)
    counts = f"{passed} passed, {len(failed)} failed, {skipped} skipped"
    if failed:
        return 1, f"verdict: FAILED ({counts}): {'; '.join(failed)}"
    if interrupted:
        return 130, f"verdict: INTERRUPTED ({counts}): what was measured is kept"
    if not passed:
        return 1, f"verdict: nothing was checked ({counts})"
    return 0, f"verdict: PASSED ({counts})"

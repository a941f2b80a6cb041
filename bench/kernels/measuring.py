"""Measure cases in separate processes. If a process dies, finished rows are kept."""

import time

from .. import interrupts
from ..errors import UserError
from ..ranks import RankError, run_ranks
from ..terminal import progress
from . import worker as kernels_worker

TIMEOUT_S = 24 * 3600.0
KILLED = "died with exit code -9"  # the kernel kills it if memory runs out
LAST = 250  # characters that are kept of an error


class Measuring:
    """Times all cases in one process (or one set of `nproc`).

    Then it records memory, on a CPU in a process for each provider. On a GPU one process serves all
    providers: the allocator counts exactly, and starting CUDA takes longer than measuring.

    rows      record.Rows; the rows to measure are pending
    worker    a module with measure_times(work, device_type, mode, budget, until) and
              measure_memory(work, device_type); see kernels/worker.py
    save      called when rows change
    progress  called with (text, rows finished since the last call)
    """

    def __init__(
        self, providers, rows, device_type, threads, save, progress, worker=kernels_worker
    ):
        self.cases, self.rows, self.device_type = rows.cases, rows, device_type
        self.providers, self.threads = {p.name: p for p in providers}, threads
        self.save, self.progress, self.worker = save, progress, worker
        self._at = None  # (index, name) that a worker is working on
        self._done = set()

    def times(self, budget, until=None):
        for nproc in sorted({case.nproc for case in self.cases}):
            job = self.worker.measure_times, self.rows.mode, budget, until
            self._drive("times", nproc, list(self.providers), *job)

    def memory(self):
        names = list(self.providers)
        for group in [names] if self.device_type == "cuda" else [[name] for name in names]:
            for nproc in sorted({case.nproc for case in self.cases}):
                self._drive("memory", nproc, group, self.worker.measure_memory)

    def _drive(self, what, nproc, names, fn, *args):
        """Run `fn` on all rows that need it. If a row ends the process, go on without that row."""
        while work := self._work(what, nproc, names):
            self._at = None
            backend = "cpu:gloo,cuda:nccl" if self.device_type == "cuda" else "gloo"
            try:
                run_ranks(
                    nproc,
                    fn,
                    work,
                    self.device_type,
                    *args,
                    timeout=TIMEOUT_S,
                    threads=max(1, self.threads // nproc),
                    backend=backend,
                    on_message=lambda rank, message: self._message(what, message),
                )
                return
            except RankError as error:
                self._blame(what, names, error)
                if self._work(what, nproc, names) == work:  # else it would repeat for ever
                    raise UserError(f"the measuring processes failed\n{error}") from error

    def _work(self, what, nproc, names):
        """[(index, case, providers)] that are still to be measured."""
        work = []
        for index, case in enumerate(self.cases):
            if case.nproc == nproc:
                todo = [n for n in names if self._todo(what, index, n)]
                if todo:
                    work.append((index, case, [self.providers[name] for name in todo]))
        return work

    def _todo(self, what, index, name):
        if what == "times":
            return self.rows.pending(index, name)
        return self.rows.status(index, name) == "ok" and (what, index, name) not in self._done

    def _message(self, what, message):
        if "at" in message:
            self._at = message["at"]
            return
        (index, name), rest = message["of"], {k: v for k, v in message.items() if k != "of"}
        if self.rows.tell(index, name, rest):
            self._done.add((what, index, name))
            self.progress(f"{self.cases[index].name}: {name}, {what}", 1)
            self.save()
        elif name not in self.providers:  # a roof
            self.progress(f"{self.cases[index].name}: {name}", 0)

    def _blame(self, what, names, error):
        """Store the failure of a process in the row that it worked on."""
        if self._at is None:
            return
        index, name = self._at
        text = str(error)
        if KILLED in text or any(sign in text for sign in kernels_worker.OOM):
            status, reason = "OOM", "its process ran out of memory"
        else:
            last = text.strip().splitlines()[-1]
            named = next(iter(error.exceptions.values()), None)
            status, reason = "failed", (": ".join(named) if named else last)[:LAST]
        # While logits are drawn or all providers are timed in turn, blame all of them.
        todo = [n for n in names if self._todo(what, index, n)]
        for blamed in [name] if name in self.providers else todo:
            if self.rows.tell(index, blamed, {"status": status, "reason": reason}):
                self._done.add((what, index, blamed))
                self.progress(f"{self.cases[index].name}: {blamed}", 1)
        self.save()


def measure(
    rows, providers, device_type, threads, budget, build, path, worker=kernels_worker, stop=None
):
    """Measure the pending rows, and return the record.

    An interrupt first writes the JSON of the finished rows.

    build  build(finished) -> the record
    path   where it is written while rows finish, or None
    stop   seconds from now after which no row is begun; None: never
    """
    from . import record

    until = None if stop is None else time.monotonic() + stop

    finished = False

    def write():
        if path:
            record.write(build(finished), path)

    save = Saver(write)
    runnable = sum(row["status"] == "pending" for row in rows.rows.values())
    with interrupts.raised(), progress(2 * runnable) as shown:
        run = Measuring(providers, rows, device_type, threads, save, shown.update, worker)
        try:
            run.times(budget, until)
            run.memory()
            finished = all(row["status"] != "pending" for row in rows.rows.values())
        finally:
            save(now=True)
    return build(finished)


class Saver:
    """Writes the record at most once a second; with `now`, at once."""

    def __init__(self, write):
        self._write, self._last = write, 0.0

    def __call__(self, now=False):
        if now or time.monotonic() - self._last > 1.0:
            self._write()
            self._last = time.monotonic()

"""Run a function in several local processes that form one process group, and never hang.

Workers are forked from a server process that has imported torch, fused_sft_loss and megatron-core,
and has run nothing. So a group starts in a fraction of a second, and the threads and the autograd
state of the caller do not matter.
"""

import importlib.util
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

GRACE_S = 3.0  # after one rank failed: the time for the others to finish or fail


class RankError(RuntimeError):
    """Some ranks raised, died or did not finish; the message holds the report of each."""

    def __init__(self, message, exceptions=None):
        super().__init__(message)
        self.exceptions = exceptions or {}  # rank -> (type name, message)


def run_ranks(
    world_size, fn, *args, timeout=120.0, threads=1, on_message=None, backend="gloo", **kwargs
):
    """Call `fn(*args, **kwargs)` in `world_size` processes; return its results in rank order.

    fn          a module-level function, because it is sent by name. It may use the default process
                group (file store); torch.distributed.get_rank() is its rank.
    timeout     seconds for the whole call; after that every process is killed
    threads     torch.set_num_threads of each process
    on_message  called here with (rank, object) for each `send_to_parent(object)` of a worker
    backend     of the process group: "gloo", or "cpu:gloo,cuda:nccl" with a GPU for each process

    Raises RankError with the report of each rank that fails, dies or is late.
    """
    context = _context(gpus="cuda" in backend)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        job = pickle.dumps((fn, args, kwargs))
        group = _Group(world_size, on_message)
        try:
            resource_tracker.ensure_running()  # first: its start unblocks SIGINT
            with _interrupts_blocked():
                for rank in range(world_size):
                    group.start(context, (rank, world_size, folder, timeout, threads, backend))
            group.send(job)
            return group.collect(time.monotonic() + timeout, timeout)
        finally:
            group.kill()


def send_to_parent(message):
    """Inside a worker of `run_ranks`: hand a picklable object to the caller's `on_message`."""
    _worker_pipe.send_bytes(pickle.dumps(("message", message)))


class _Group:
    """The parent's view of the workers: their pipes, results and failures."""

    def __init__(self, world_size, on_message):
        self.world_size, self.on_message = world_size, on_message
        self.processes, self.pipes = [], {}  # pipe -> rank, open ones only
        self.results, self.failures, self.exceptions = {}, {}, {}

    def start(self, context, args):
        mine, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, *args), daemon=True)
        process.start()
        theirs.close()
        self.pipes[mine] = len(self.processes)
        self.processes.append(process)

    def send(self, job):
        """Send the job to all workers. They wait for it, and end if the pipe closes."""
        for pipe, rank in list(self.pipes.items()):
            try:
                pipe.send_bytes(job)
            except OSError:  # dead already: collect() reports it
                self.failures.setdefault(rank, "died before it began")

    def collect(self, deadline, timeout):
        """Read until all ranks answered, or GRACE_S after one failed, or until the deadline."""
        while self.pipes:
            for pipe in wait(list(self.pipes), max(0.0, deadline - time.monotonic())):
                self._read(pipe)
            if time.monotonic() >= deadline:
                break
            if self.failures:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if self.failures or self.pipes:
            late = sorted(self.pipes.values())
            reports = [f"rank {r}:\n{self.failures[r].rstrip()}" for r in sorted(self.failures)]
            if late:
                why = f"within {timeout:g} s" if not self.failures else "after the others failed"
                reports.append(f"rank(s) {late} did not finish {why} and were killed")
            raise RankError("\n".join(reports), self.exceptions)
        return [self.results[rank] for rank in range(self.world_size)]

    def _read(self, pipe):
        rank = self.pipes[pipe]
        try:
            kind, value = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            del self.pipes[pipe]
            self.processes[rank].join(GRACE_S)
            self.failures[rank] = f"died with exit code {self.processes[rank].exitcode}"
            return
        if kind == "message":
            if self.on_message is not None:
                self.on_message(rank, value)
            return
        del self.pipes[pipe]
        if kind == "result":
            self.results[rank] = value
        else:
            self.failures[rank], self.exceptions[rank] = value

    def kill(self):
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()


def _work(pipe, rank, world_size, folder, timeout, threads, backend):
    """What a worker runs: join the group, run the job, report, exit."""
    global _worker_pipe
    _worker_pipe = pipe
    try:
        job = pipe.recv_bytes()
    except (EOFError, OSError):  # the caller gave up before it began
        os._exit(1)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        torch.set_num_threads(threads)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        fn, args, kwargs = pickle.loads(job)
        answer = pickle.dumps(("result", fn(*args, **kwargs)))
        dist.barrier()  # leave together: a peer may still be reading from this rank
    except BaseException as error:
        report = (traceback.format_exc(), (type(error).__name__, str(error)))
        answer = pickle.dumps(("failure", report))
    pipe.send_bytes(answer)
    # Skip destructors: gloo's threads may wait forever for a peer that has died.
    pipe.close()
    os._exit(0)


def _die_with_parent():
    """Exit when the process that called run_ranks has ended, even if it was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _context(gpus):
    """A forkserver that does the slow imports once; spawn on platforms without a forkserver.

    With GPUs the server imports only torch: some libraries start CUDA when they are imported, and
    CUDA does not work after a fork.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    preload = ["torch", "torch.distributed"]
    if not gpus:
        preload.append("fused_sft_loss")
        if importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core"):
            preload.append("bench.megatron_preload")
    context.set_forkserver_preload(preload)
    return context


class _interrupts_blocked:
    """Blocks SIGINT. Processes started inside inherit this, so only the parent reacts to Ctrl-C."""

    def __enter__(self):
        self.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def __exit__(self, *exc):
        signal.pthread_sigmask(signal.SIG_SETMASK, self.before)


_worker_pipe = None

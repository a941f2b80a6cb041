"""Start a bench command as a user does, and interrupt it with Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = "BENCH_TEST_MARK"


def new_mark():
    """A string that identifies a command and all processes that it starts."""
    return uuid.uuid4().hex


def start(*arguments, mark="", launcher=()):
    """`python -m bench ARGUMENTS` in a new process group, run by `launcher` if given."""
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "bench", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a signal to the group does not reach the tests
    )


def interrupted(process, mark):
    """Send Ctrl-C, wait until no process is left, and return stderr."""
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    deadline = time.monotonic() + 30
    while alive(mark):
        assert time.monotonic() < deadline, alive(mark)
        time.sleep(0.1)
    return errors


def alive(mark):
    """Command lines of processes with the mark, except the forkserver's resource tracker."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" "))
        except OSError:
            continue
    return [line for line in found if line and b"resource_tracker" not in line]

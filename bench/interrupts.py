"""Ctrl-C ends a command at any time, with one line of text."""

import os
import signal
import sys
import time
from contextlib import contextmanager

STATUS = 130  # what a shell reports if SIGINT ends a process
AGAIN_S = 1.0


def exit_at_once():
    """From now on Ctrl-C ends the process at once.

    A KeyboardInterrupt would get lost while large libraries are imported, because some of them
    catch all exceptions. There is nothing to clean up at that time.
    """
    signal.signal(signal.SIGINT, _exit)


@contextmanager
def raised(*others):
    """Inside, Ctrl-C raises KeyboardInterrupt, so that the work can clean up.

    A second one within AGAIN_S is the same interrupt: `timeout` signals a process and its group.
    Raised while the first is handled, it would end the cleaning up.

    others  further signals that do the same
    """
    last = -AGAIN_S

    def handler(signum, frame):
        nonlocal last
        if time.monotonic() - last >= AGAIN_S:
            last = time.monotonic()
            raise KeyboardInterrupt

    numbers = (signal.SIGINT, *others)
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def tell():
    os.write(sys.stderr.fileno(), b"bench: interrupted\n")


def _exit(signum, frame):
    tell()
    os._exit(STATUS)

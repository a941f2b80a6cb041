"""Ctrl-C ends a command at any time, with one line of text."""

import os
import signal
import sys
from contextlib import contextmanager

STATUS = 130  # what a shell reports if SIGINT ends a process


def exit_at_once():
    """From now on Ctrl-C ends the process at once.

    A KeyboardInterrupt would get lost while large libraries are imported, because some of them
    catch all exceptions. There is nothing to clean up at that time.
    """
    signal.signal(signal.SIGINT, _exit)


@contextmanager
def raised(*others):
    """Inside, Ctrl-C raises KeyboardInterrupt, so that the work can clean up.

    others  further signals that do the same
    """
    numbers = (signal.SIGINT, *others)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
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

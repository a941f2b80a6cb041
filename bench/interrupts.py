"""Ctrl-C ends a command in one line, whatever it is doing."""

import os
import signal
import sys
from contextlib import contextmanager

STATUS = 130  # the shell's own for a process ended by SIGINT


def exit_at_once():
    """From now on Ctrl-C ends the process where it is.

    The usual KeyboardInterrupt gets lost in the imports of large libraries, which catch everything
    in places; there is nothing to clean up at that time.
    """
    signal.signal(signal.SIGINT, _exit)


@contextmanager
def raised():
    """Inside, Ctrl-C is a KeyboardInterrupt: for work that leaves something to clean up."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def tell():
    os.write(sys.stderr.fileno(), b"bench: interrupted\n")


def _exit(signum, frame):
    tell()
    os._exit(STATUS)

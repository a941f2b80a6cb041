"""Tables and progress bars in a terminal, by rich; plain text where rich is not installed.

A cluster's image may have torch and nothing else, and the measurements need no more than that.
"""

import sys
import time

from .pages.markdown import table as markdown

try:
    from rich import box
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars
    from rich.table import Table
except ImportError:
    Table = None

WIDTH = 170  # of a table that is written to a file
EVERY_S = 10.0  # seconds between lines of progress without rich


def console():
    """A console as wide as the terminal; if piped, WIDTH columns of plain text."""
    if Table is None:
        return _PlainConsole()
    out = Console(highlight=False)
    return out if out.is_terminal else Console(width=WIDTH, highlight=False)


def new_table(out, title, names, left=2, wraps=0):
    """A table to fill by add_row and add_section, and to print with `out`, a `console()`."""
    if Table is None:
        return _PlainTable(title, names, left)
    table = Table(title=title, box=box.SIMPLE_HEAD if out.is_terminal else box.ASCII2)
    for number, name in enumerate(names):
        side = "left" if number < left else "right"
        table.add_column(name, justify=side, no_wrap=number != wraps)
    return table


def progress(total):
    """A context with update(text, finished): the rows, with the time left, on stderr."""
    return _PlainProgress(total) if Table is None else _Progress(total)


class _Progress:
    """A progress bar of the rows, with the time left. Only the parent process calls `update`."""

    def __init__(self, total):
        columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        eta = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bars = Bars(*columns, *eta, console=Console(stderr=True))
        self._task = self._bars.add_task("starting", total=total)

    def __enter__(self):
        self._bars.start()
        return self

    def __exit__(self, *exc):
        self._bars.stop()

    def update(self, text, finished):
        self._bars.update(self._task, description=text, advance=finished)


class _PlainProgress:
    """A line every EVERY_S seconds."""

    def __init__(self, total):
        self._total, self._done, self._last = total, 0, time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def update(self, text, finished):
        self._done += finished
        if time.monotonic() - self._last >= EVERY_S:
            self._last = time.monotonic()
            print(f"{self._done}/{self._total} {text}", file=sys.stderr, flush=True)


class _PlainConsole:
    is_terminal = False

    def print(self, *what):
        print(*what)


class _PlainTable:
    """A Markdown table below its title."""

    def __init__(self, title, names, left):
        self._title, self._names, self._left, self._rows = title, names, left, []

    def add_row(self, *cells):
        self._rows.append((*cells, *[""] * (len(self._names) - len(cells))))

    def add_section(self):
        pass

    def __str__(self):
        return f"{self._title}\n{markdown(self._names, self._rows, self._left)}"

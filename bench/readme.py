"""python -m bench readme: write the generated parts of the README and of docs/.

Tables and pictures come from the records in bench/results, docs/api.md from the docstrings. With
--check nothing is written, and parts that are out of date are an error.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .agreement import FOLDER
from .errors import UserError, need
from .kernels import record
from .pages import agreement, api, gain, records

ROOT = Path(__file__).parent.parent
BENCHMARKS = "docs/benchmarks.md"
AFTER_DEVICES = "## How it is measured\n"  # the heading before which a new device is added


def add_arguments(parser):
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it is needed")
    parser.add_argument("--root", default=str(ROOT), metavar="DIR", help="of README.md and docs/")
    parser.add_argument("--results", default=str(ROOT / "bench/results"), metavar="DIR")


def run(args):
    root, results = Path(args.root), Path(args.results)
    measured, long_runs = read_records(results), read_long_runs(results)
    stale = {}
    for name, blocks in pages(measured, long_runs, _read(root / "README.md")).items():
        before = _read(root / name)
        with_places = with_new_devices(before, measured) if name == BENCHMARKS else before
        after = with_blocks(with_places, blocks, name)
        if after != before:
            stale[name] = after
    undrawn = [one for one in _pictures(root, measured, long_runs) if not one.is_drawn()]
    if not args.check:
        _write(root, stale, undrawn)
    elif stale or undrawn:
        names = ", ".join([*stale, *(picture.path.name for picture in undrawn)])
        raise UserError(
            f"out of date: {names}. They are generated; write them with: python -m bench readme"
        )
    return 0


def read_records(folder):
    """{name of a device: its record}, of all records in `folder`."""
    found = {path.stem: record.read(path) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise UserError(f"expected records in {folder}, got none; make them with: make bench")
    return found


def read_long_runs(folder):
    """{name of a device: its record of `bench agreement`}, of all in `folder`."""
    paths = sorted((folder / FOLDER).glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def pages(measured, long_runs, readme):
    """{page: {name of a generated block: its Markdown}}."""
    of_devices = {name: records.section(one, name) for name, one in measured.items()}
    of_long_runs = {"agreement": agreement.section(long_runs)} if long_runs else {}
    return {
        "README.md": gain.blocks(measured),
        "docs/index.md": {"options": options(readme)},
        BENCHMARKS: of_devices | of_long_runs,
        "docs/api.md": api.blocks(ROOT),
    }


def options(readme):
    """The README's table of options. docs/index.md copies it, so it is edited in one place."""
    lines = readme.partition("\n| option |")[2].splitlines()
    if not lines:
        raise UserError("README.md: expected a table that begins with | option |")
    last = next((n for n, line in enumerate(lines) if n and not line.startswith("|")), len(lines))
    return "\n".join([f"| option |{lines[0]}", *lines[1:last]])


def with_new_devices(text, measured):
    """The page of benchmarks, with a heading and markers for each device that has none."""
    for name, one in measured.items():
        begin, end = markers(name)
        if begin in text or end in text or text.count(AFTER_DEVICES) != 1:
            continue  # with_blocks says what is wrong with a page that has no place for it
        place = f"## {one['machine']['device']}\n\n{begin}\n\n{end}\n\n{AFTER_DEVICES}"
        text = text.replace(AFTER_DEVICES, place)
    return text


def with_blocks(text, blocks, page):
    """The page `text` with each generated block between its two markers."""
    for name, inside in blocks.items():
        begin, end = markers(name)
        parts = text.split(begin), text.split(end)
        if [len(part) for part in parts] != [2, 2]:
            raise UserError(f"{page}: expected the markers {begin} and {end}, once each")
        text = f"{parts[0][0]}{begin}\n\n{inside.strip()}\n\n{end}{parts[1][1]}"
    return text


def markers(name):
    return f"<!-- generated: {name} -->", f"<!-- end of {name} -->"


def _read(path):
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


@dataclass(frozen=True)
class _Picture:
    """A picture in docs/img, drawn from a record."""

    path: Path
    record: dict
    draw: Callable  # draw(record, path)

    def is_drawn(self):
        """Whether it exists and was drawn from this record."""
        from .kernels import plots

        return self.path.exists() and plots.source_of(self.path) == plots.digest(self.record)


def _pictures(root, measured, long_runs):
    need("matplotlib")
    from .agreement import picture
    from .kernels import plots

    docs = root / "docs"
    of_losses = [(records.picture(name), one, plots.draw) for name, one in measured.items()]
    of_runs = [(agreement.picture(name), one, picture.draw) for name, one in long_runs.items()]
    return [_Picture(docs / name, one, draw) for name, one, draw in of_losses + of_runs]


def _write(root, stale, undrawn):
    for name, text in stale.items():
        (root / name).write_text(text, encoding="utf-8")
        print(f"written: {root / name}")
    for picture in undrawn:
        picture.path.parent.mkdir(exist_ok=True)
        picture.draw(picture.record, picture.path)
        print(f"written: {picture.path}")

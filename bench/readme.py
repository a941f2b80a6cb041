"""python -m bench readme: write the generated parts of the README and of docs/.

Tables and pictures come from the records in bench/results, docs/api.md from the docstrings. With
--check nothing is written, and parts that are out of date are an error.
"""

from pathlib import Path

from .errors import UserError, need
from .kernels import record
from .pages import api, gain, records

ROOT = Path(__file__).parent.parent
BENCHMARKS = "docs/benchmarks.md"
AFTER_DEVICES = "## How it is measured\n"  # the heading before which a new device is added


def add_arguments(parser):
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it is needed")
    parser.add_argument("--root", default=str(ROOT), metavar="DIR", help="of README.md and docs/")
    parser.add_argument("--results", default=str(ROOT / "bench/results"), metavar="DIR")


def run(args):
    root, measured = Path(args.root), read_records(Path(args.results))
    stale = {}
    for name, blocks in pages(measured, _read(root / "README.md")).items():
        before = _read(root / name)
        with_places = with_new_devices(before, measured) if name == BENCHMARKS else before
        after = with_blocks(with_places, blocks, name)
        if after != before:
            stale[name] = after
    pictures = [name for name in measured if not _drawn(root, name, measured[name])]
    if not args.check:
        _write(root, stale, {name: measured[name] for name in pictures})
    elif stale or pictures:
        names = ", ".join([*stale, *(str(_picture(root, name).name) for name in pictures)])
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


def pages(measured, readme):
    """{page: {name of a generated block: its Markdown}}."""
    return {
        "README.md": gain.blocks(measured),
        "docs/index.md": {"options": options(readme)},
        BENCHMARKS: {name: records.section(one, name) for name, one in measured.items()},
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


def _picture(root, name):
    return root / "docs" / "img" / f"{name}.png"


def _drawn(root, name, measured):
    """Whether the picture exists and was drawn from this record."""
    path = _picture(root, name)
    need("matplotlib")
    from .kernels import plots

    return path.exists() and plots.source_of(path) == plots.digest(measured)


def _write(root, stale, undrawn):
    for name, text in stale.items():
        (root / name).write_text(text, encoding="utf-8")
        print(f"written: {root / name}")
    for name, measured in undrawn.items():
        from .kernels import plots

        path = _picture(root, name)
        path.parent.mkdir(exist_ok=True)
        plots.draw(measured, path)
        print(f"written: {path}")

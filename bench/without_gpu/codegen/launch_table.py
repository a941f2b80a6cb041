"""The launch table of the CUDA and HIP kernels, printed by a program that includes its header."""

import json
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from csrc.toolchains import compilers

from ...errors import UserError
from ..chips import AMD, CHIPS
from . import compiled_cache

ROOT = Path(__file__).parents[3]
SOURCE = Path(__file__).with_name("launch_table.cpp")


@dataclass(frozen=True)
class Line:
    """A line of csrc/gpu/launch_table.h for one chip and one kernel."""

    target: str
    kernel: str
    columns: int | None  # serves V_local up to this; None: any
    threads: int
    segment: int
    why: str


@cache
def launch_table() -> tuple[Line, ...]:
    targets = {_generation(name): name for name in CHIPS}
    printed = json.loads(_printed(list(targets)))
    return tuple(Line(targets[line.pop("generation")], **line) for line in printed)


def lines(target: str, kernel: str) -> list[Line]:
    """Lines of one chip and kernel, narrowest first; none for a kernel over vectors of N rows."""
    return [line for line in launch_table() if (line.target, line.kernel) == (target, kernel)]


def _generation(name: str) -> str:
    """As in struct Chip of csrc/gpu/launch.h: 90 for sm_90, 0x942 for gfx942."""
    return f"0x{name.removeprefix('gfx')}" if name in AMD else name.removeprefix("sm_")


def _printed(generations: list[str]) -> bytes:
    """Cached in build/codegen; a new source, compiler or list of chips prints again."""
    try:
        compiler = compilers.cxx()
    except compilers.Missing as missing:
        raise UserError(f"the launch table is compiled to be read: {missing}") from missing
    command = [*compiler, "-std=c++17"]
    source = _run([*command, "-E", "-P", str(SOURCE)])
    made_of = " ".join([*command, compilers.version(*compiler), *generations])
    name = compiled_cache.digest(source, made_of.encode())
    path = ROOT / "build/codegen/launch_table" / f"{name}.json"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            program = f"{folder}/launch_table"
            _run([*command, str(SOURCE), "-o", program])
            compiled_cache.write(path, _run([program, *generations]))
    return path.read_bytes()


def _run(command: list[str]) -> bytes:
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr.decode(errors='replace')}")
    return done.stdout

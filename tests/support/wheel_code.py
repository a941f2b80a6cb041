"""Read for which GPUs a compiled module contains code.

    python tests/support/wheel_code.py dist/*.whl

The formats are those that nvcc and clang put into a library: NVIDIA's fat binaries (undocumented;
`cuobjdump --list-elf` prints the same targets) and clang's offload bundles.
"""

import re
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from elftools.elf.elffile import ELFFile

FATBIN = 0xBA55ED50
KINDS = {1: "compute", 2: "sm"}  # PTX, machine code
BUNDLE = b"__CLANG_OFFLOAD_BUNDLE__"


def code_targets(file: IO[bytes]) -> list[str]:
    """The targets of a module's GPU code, like sm_90, compute_100 (PTX) and gfx942."""
    elf = ELFFile(file)
    found = set()
    for name, read in ((".nv_fatbin", _fatbins), (".hip_fatbin", _bundles)):
        if section := elf.get_section_by_name(name):
            found |= set(read(section.data()))
    return sorted(found, key=lambda target: (len(target), target))


def missing_targets(built: list[str], targets: list[str]) -> list[str]:
    """The targets of a build (9.0a, 10.0+PTX, gfx942:xnack-) that `targets` lacks.

    The letter of 9.0a is not in the names of machine code.
    """
    lacking = []
    for target in built:
        cuda = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", target)
        chip = f"{cuda[1]}{cuda[2]}" if cuda else ""
        names = [f"sm_{chip}"] + [f"compute_{chip}"] * bool(cuda[3]) if cuda else [target]
        lacking += [target] * (not set(names) <= set(targets))
    return lacking


def _fatbins(data: bytes) -> Iterator[str]:
    """Fat binaries one after the other, each of a header and entries with headers."""
    place = 0
    while place + 16 <= len(data):
        magic, _, header, size = struct.unpack_from("<IHHQ", data, place)
        if magic != FATBIN:  # padding
            place += 8
            continue
        entry, place = place + header, place + header + size
        while entry < place:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, entry)
            (chip,) = struct.unpack_from("<I", data, entry + 28)
            yield f"{KINDS.get(kind, kind)}_{chip}"
            entry += header + size


def _bundles(data: bytes) -> Iterator[str]:
    """Bundles, each with a table: offset, size, and an id like hipv4-amdgcn-amd-amdhsa--gfx942."""
    place = data.find(BUNDLE)
    while place >= 0:
        place += len(BUNDLE)
        (count,) = struct.unpack_from("<Q", data, place)
        entry = place + 8
        for _ in range(count):
            _, _, length = struct.unpack_from("<QQQ", data, entry)
            kind, _, target = data[entry + 24 : entry + 24 + length].decode().partition("--")
            if not kind.startswith("host"):
                yield target
            entry += 24 + length
        place = data.find(BUNDLE, place)


def modules(wheel: Path) -> Iterator[tuple[str, list[str]]]:
    """(name of the module, targets of its code) for each module of a wheel."""
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if module := re.fullmatch(r"fused_sft_loss/(_\w+)\.[^/]*\.so", name):
                with files.open(name) as file:
                    yield module[1], code_targets(file)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        for module, targets in modules(path):
            print(path.name, module, *targets)

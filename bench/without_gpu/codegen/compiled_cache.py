"""Records and compiled code that are found again by what they were made of."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path


def described(folder: Path, code: bytes, about: tuple, make: Callable):
    """What `make` says of `code` (JSON-able), from `folder` when it was said before.

    `about`: what else it depends on; the analysis itself is taken care of.
    """
    path = folder / f"{digest(code, repr(about).encode(), _analysis())}.json"
    if not path.exists():
        write(path, json.dumps(make()).encode())
    return json.loads(path.read_text())


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


def write(path: Path, content: bytes) -> None:
    """At once, or not at all: another process may be reading or writing it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


@cache
def _analysis() -> bytes:
    """The files that make a record: another analysis, another record."""
    here = Path(__file__).parent
    names = (
        "../chips",
        "amdgcn",
        "instances",
        "launch_table",
        "loops",
        "machine_code",
        "native",
        "predict",
        "record",
        "sass",
    )
    return b"".join((here / f"{name}.py").read_bytes() for name in names)

"""Cache of records and compiled code, keyed by the hash of their inputs."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path


def described(folder: Path, code: bytes, about: tuple, make: Callable):
    """The result of `make`, a JSON-able description of `code`, cached in `folder`.

    `about` holds the other inputs of `make`. The analysis' own source is always part of the key.
    """
    path = folder / f"{digest(code, repr(about).encode(), _analysis())}.json"
    if not path.exists():
        write(path, json.dumps(make()).encode())
    return json.loads(path.read_text())


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


def write(path: Path, content: bytes) -> None:
    """Write atomically: another process may be reading or writing the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


@cache
def _analysis() -> bytes:
    """The source files that make a record; a change to them invalidates the cache."""
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

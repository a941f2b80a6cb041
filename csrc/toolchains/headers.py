"""Where pybind11's headers are: in its package, or in torch, which ships a copy.

An image with torch on a machine without a network may have no other. The modules stay free of
torch: they include none of its own headers.
"""

import importlib.util
from pathlib import Path


def pybind11() -> str | None:
    """The folder that contains pybind11/pybind11.h, or None."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            folder = Path(spec.origin).parent / "include"
            if (folder / "pybind11/pybind11.h").is_file():
                return str(folder)
    return None

"""Import the compiled modules, each when it is first wanted.

``_cuda`` has NVIDIA's runtime inside and loads on any machine. ``_hip`` has none: it must use the
copy that torch has loaded, since a stream of one copy means nothing to another.
"""

import ctypes
import importlib.util
import os
from pathlib import Path
from types import ModuleType

PACKAGE = __package__.partition(".")[0]


def load(backend: str) -> ModuleType:
    """The compiled module of "cpu", "cuda" or "hip".

    Raises:
        ImportError: it was not built, or (hip) torch brings no runtime for it, or there are two.
    """
    name = f"{PACKAGE}._{backend}"
    if backend == "hip" and importlib.util.find_spec(name):
        share_hip_runtime()
    return importlib.import_module(name)


def loaded_hip_runtimes() -> list[str]:
    """The files of every libamdhip64 in this process. More than one is one too many."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux, where there is no HIP either
        return []
    files = {line.split(maxsplit=5)[5] for line in lines if "libamdhip64" in line}
    return sorted(file for file in files if Path(file).name.startswith("libamdhip64.so"))


def share_hip_runtime() -> None:
    """Let modules loaded from here on find the symbols of the HIP runtime that torch has loaded."""
    runtimes = loaded_hip_runtimes()
    if not runtimes:
        raise ImportError("no HIP runtime is loaded: torch is not a ROCm build")
    if len(runtimes) > 1:
        raise ImportError(
            f"expected one HIP runtime in the process, the one torch brings, got "
            f"{' and '.join(runtimes)}; find what loads the other (LD_PRELOAD, LD_LIBRARY_PATH, "
            "a package that bundles its own)"
        )
    ctypes.CDLL(runtimes[0], mode=os.RTLD_GLOBAL | os.RTLD_NOLOAD | os.RTLD_NOW)

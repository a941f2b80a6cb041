"""Where a figure was measured: processor, versions, settings. Goes into every record."""

import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "megatron-core", "fused_sft_loss", "numpy", "mistral-common")


def describe(command, argv):
    """A JSON-able dict; `command` is the bench command, `argv` its arguments."""
    import fused_sft_loss
    from fused_sft_loss.backends import choose

    versions = {name: _version(name) for name in PACKAGES}
    return {
        "command": shlex.join(["python", "-m", "bench", command, *argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(),
        "memory_bytes": _total_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {**versions, "fused_sft_loss": fused_sft_loss.__version__},
        "backend": choose.resolve(None, "cpu"),
    }


def arguments():
    """The command line after the command's name."""
    return sys.argv[2:]


def usable_cores():
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def last_level_cache():
    """Bytes of the largest cache that the first core sees, or None."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes) or None


def _total_memory():
    try:
        line = Path("/proc/meminfo").read_text().splitlines()[0]
        return int(line.split()[1]) * 1024
    except (OSError, IndexError, ValueError):
        return None


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None

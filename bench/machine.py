"""Describes where something was measured: processor, versions, settings. Part of every record."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "megatron-core", "fused_sft_loss", "numpy", "mistral-common")
PACKAGES += (
    "triton",
    "liger-kernel",
    "transformer_engine",
    "flash-attn",
    "quack-kernels",
    "amd-aiter",
)
ROOT = Path(__file__).parent.parent


def describe(command, argv, device="cpu"):
    """A JSON-able dict; `command` is the bench command, `argv` its arguments."""
    import fused_sft_loss
    from fused_sft_loss.backends import selection

    versions = {name: _version(name) for name in PACKAGES}
    return {
        "command": shlex.join(["python", "-m", "bench", command, *argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(device),
        "clocks_mhz": clocks(device),
        "load_average": os.getloadavg()[0],  # other running programs slow it down
        "processor": processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": cache(device),
        "memory_bytes": _total_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {**versions, "fused_sft_loss": fused_sft_loss.__version__},
        "backend": selection.resolve(None, device),
    }


def arguments():
    """The command line after the command's name."""
    return sys.argv[2:]


def commit():
    """The checkout's commit, "-dirty" when files differ from it; None outside a checkout."""
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")


def device_name(device):
    """The name of the processor, or the number and the name of the GPUs."""
    if device != "cuda":
        return processor()
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def clocks(device):
    """Current MHz of each core, or of each GPU's processor and memory; None if not readable."""
    if device == "cuda":
        tool = "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"
        text = _output("nvidia-smi", *tool) or _output("rocm-smi", "--showclocks", "--csv")
        return text and text.splitlines()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")] or None


def _output(*command):
    """The output of a program, or None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


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


def cache(device):
    """Bytes of the last-level cache of a torch device, or None."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return last_level_cache()


def free_memory():
    """Bytes that a process can still allocate on the machine and in its control group, or None."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        free = [int(available.split()[1]) * 1024]
    except (OSError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        free.append(int(limit) - int(used))
    except (OSError, ValueError):  # no control group, or "max": no limit
        pass
    return min(free)


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

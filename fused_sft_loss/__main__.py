"""``python -m fused_sft_loss env``: the backends, which one runs here, why the others do not."""

import argparse
import platform
import sys

import torch

from . import __version__
from .backends import devices as gpus
from .backends import loader, selection


def environment() -> list[str]:
    """The lines of the report."""
    lines = [
        f"fused_sft_loss {__version__}, torch {torch.__version__}, "
        f"python {platform.python_version()}",
        f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} torch threads",
    ]
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        lines.append(f"device {device}: backend=None takes {selection.resolve(None, device)!r}")
        for name in selection.MODULES:
            reason = selection.reason_against(name, device)
            lines.append(f"  {name:7s} {'available' if reason is None else 'no: ' + reason}")
        lines += [f"  {found}" for found in _found(device)]
    if "cuda" not in devices:
        lines.append("device cuda: none (torch.cuda.is_available() is False)")
    lines += [f"{backend} kernels: {_built(backend)}" for backend in ("cpu", "cuda", "hip")]
    runtimes = loader.loaded_hip_runtimes()
    if runtimes:
        trouble = "" if len(runtimes) == 1 else f"error: {len(runtimes)} copies in one process: "
        lines.append(f"HIP runtime: {trouble}{', '.join(runtimes)}")
    return lines


def _found(device: str) -> list[str]:
    """The GPUs of this process, and the newest CUDA that the driver runs."""
    if device != "cuda":
        return []
    count = torch.cuda.device_count()
    lines = [
        f"cuda:{index} is {torch.cuda.get_device_name(index)}, {gpus.architecture(index)}"
        for index in range(count)
    ]
    driver = gpus.driver_version()
    if driver is not None:
        lines.append(f"the driver runs CUDA {driver[0]}.{driver[1]}")
    return lines


def _built(backend: str) -> str:
    """The build_info() of a compiled module, or why it cannot be loaded."""
    try:
        info = loader.load(backend).build_info()
    except ImportError as error:
        return f"none ({error})"
    return ", ".join(f"{key} {_join(info[key])}" for key in info)


def _join(value: object) -> str:
    return "/".join(value) if isinstance(value, list) else str(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_sft_loss", description=__doc__)
    parser.add_argument("command", choices=["env"], help="print the environment report")
    parser.parse_args(arguments)
    try:
        print("\n".join(environment()))
    except (ValueError, NotImplementedError) as error:  # FUSED_SFT_LOSS_BACKEND cannot run here
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What this machine has: a GPU, compilers, compiled modules. `python -m bench.gpu.found` asks it.

The command asks in another process, because a broken driver may hang, and because the command
itself then holds no memory of the GPU.
"""

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
SANITIZER = "compute-sanitizer"


@dataclass(frozen=True)
class Found:
    """
    device      "cuda" (for torch also an AMD GPU), "cpu" in a rehearsal, None without a GPU
    why         why there is no device
    slug        the name of the device's record
    native      the backend of compiled kernels for this GPU: "cuda" or "hip"
    reasons     {backend: why it cannot run on this GPU, or None}
    built       whether the native module was built
    target      what the compiler has to be told to build for this GPU: "9.0a", "gfx942"
    compiler    the toolchain; None if there is none, and then `missing` says why
    sanitizer   the path of compute-sanitizer, or None
    lines       what to print
    """

    device: str | None = None
    why: str = ""
    slug: str = "cpu"
    native: str = "cuda"
    reasons: dict = field(default_factory=dict)
    built: bool = False
    target: str = ""
    compiler: str | None = None
    missing: str = ""
    sanitizer: str | None = None
    lines: list = field(default_factory=list)


def lacking(modules):
    """Those of `modules` that this Python cannot find."""
    return [name for name in modules if not _is_there(name)]


def _is_there(module):
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the parent package is missing
        return False


def look(device):
    """A Found of this process. `device`: "cuda", or "cpu" for a rehearsal without a GPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return Found(why=f"torch {torch.__version__} in {sys.executable} sees no GPU")

    from fused_sft_loss.__main__ import environment
    from fused_sft_loss.backends import selection

    from ..kernels.command import device_slug

    lines = environment()
    native = "hip" if torch.version.hip else "cuda"
    compiler, missing = _compiler(native)
    return Found(
        device=device,
        slug=device_slug(device),
        native=native,
        reasons={name: selection.reason_against(name, device) for name in (native, "triton")},
        built=importlib.util.find_spec(f"fused_sft_loss._{native}") is not None,
        target=_target(device),
        compiler=compiler,
        missing=missing,
        sanitizer=_sanitizer() if native == "cuda" and device == "cuda" else None,
        lines=[*lines, f"compiler for this GPU: {compiler or 'none: ' + missing}"],
    )


def _target(device):
    """The current device, written as TORCH_CUDA_ARCH_LIST or PYTORCH_ROCM_ARCH takes it."""
    from fused_sft_loss.backends.devices import architecture

    if device != "cuda":
        return ""
    name = architecture(0).partition(":")[0]
    return "9.0a" if name == "9.0" else name  # clusters need the "a"


def _compiler(native):
    """(toolchain, "") or (None, why there is none)."""
    from csrc.toolchains import compilers

    try:
        return {"cuda": compilers.cuda, "hip": compilers.hip}[native]().toolchain, ""
    except compilers.Missing as missing:
        return None, str(missing)
    except SystemExit as refused:  # a variable names something wrong
        return None, str(refused)


def _sanitizer():
    return shutil.which(SANITIZER, path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


if __name__ == "__main__":
    print(json.dumps(asdict(look(sys.argv[1]))))

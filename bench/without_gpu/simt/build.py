"""Compile device files for the SIMT shim in this folder; it runs every GPU thread on the CPU."""

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from csrc.toolchains import compilers, optional

ROOT = Path(__file__).parents[3]
SHIM = Path(__file__).parent
OBJECTS = ROOT / "build" / "simt"
COMPILER = os.environ.get("CXX", "c++")
BASE = ("-std=c++17", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
# The device compilers do not contract a * b + c into an FMA; neither may this one.
DEVICE = (
    *("-O2", "-ffp-contract=off", f"-I{ROOT / 'csrc/gpu'}", f"-I{SHIM}"),
    '-DFSL_PLATFORM_HEADER="platform_simt.h"',
)
ASAN = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
TSAN = ("-fsanitize=thread",)


def missing():
    """Why this machine cannot compile for the shim, or None."""
    try:
        return optional.reason_without_boost()
    except compilers.Missing as missing:
        return str(missing)


def run(command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def compile_object(source, flags):
    """The object file. Reuses one from an earlier run if the preprocessed source is the same."""
    command = [COMPILER, *BASE, *flags, "-x", "c++"]
    text = run([*command, "-E", source])
    name = hashlib.sha256("\0".join([*map(str, command), text]).encode()).hexdigest()[:32]
    target = OBJECTS / f"{name}.o"
    if not target.exists():
        OBJECTS.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        run([*command, "-c", source, "-o", unfinished])
        unfinished.replace(target)
    return target


def instructions():
    """Flags for this CPU's FMA and fp16 instructions: no library calls, and the same results."""
    cpu = Path("/proc/cpuinfo")
    known = cpu.read_text().split() if cpu.exists() else ()
    return tuple(f"-m{name}" for name in ("fma", "f16c") if name in known)


def device_objects(sources, warp, flags=()):
    """Objects of the device files for warps of `warp` lanes, and of the shim."""
    device = (*DEVICE, *instructions(), f"-DFSL_SIMT={warp}", *flags)
    # One shim serves every program: it finds out at run time which sanitizers are linked in.
    shim = ("-O2", "-DFSL_SIMT=0", f"-I{SHIM}")
    jobs = [(source, device) for source in sources]
    jobs += [(source, shim) for source in sorted(SHIM.glob("*.cpp"))]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: compile_object(*job), jobs))


def compile_program(sources, output, warp, flags=()):
    """Build program `output` from `sources` for `warp` lanes; `flags` reach compiler and linker."""
    objects = device_objects(sources, warp, flags)
    run([COMPILER, *objects, "-o", output, *flags, "-lboost_context"])
    return Path(output)

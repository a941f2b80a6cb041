"""Check that wheels can be published.

    python tests/support/wheel_check.py dist/*.whl         check contents and linked libraries
    python tests/support/wheel_check.py --use dist/*.whl   also run each in an empty environment,
                                                           and compare targets with GPU code

A wheel serves every torch from 2.6 on and every cluster image, because its modules need only the
system's C and C++ runtimes. Each rule here keeps out another dependency.
"""

import argparse
import ctypes.util
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import wheel_code
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

MAX_MEGABYTES = 20

#: Libraries that every manylinux system has.
LISTED = {
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "librt.so.1",
    "libpthread.so.0",
    "libgcc_s.so.1",
    "libstdc++.so.6",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
TORCH = re.compile(r"torch|c10|_ZNK?2at|[A-Z_]2at[0-9]|at::|GOMP_")
#: Symbols that exist at run time although no library in LISTED has them: the interpreter's, and for
#: _hip the HIP runtime's, which torch has loaded.
PROVIDED = {"_hip": re.compile(r"_?Py|_{0,2}hip"), None: re.compile(r"_?Py")}
LABELS = {"cpu": {"_cpu"}, "cu": {"_cpu", "_cuda"}, "rocm": {"_cpu", "_hip"}}


@dataclass
class Elf:
    """What a shared library needs from the system that loads it."""

    needed: list[str]
    search_paths: list[str]  # RPATH and RUNPATH
    symbols: list[str]  # all dynamic ones
    unversioned: list[str]  # undefined and not weak, without a library's version


def read_elf(file: IO[bytes]) -> Elf:
    elf = ELFFile(file)
    versions = elf.get_section_by_name(".gnu.version")
    result = Elf([], [], [], [])
    for section in elf.iter_sections():
        if isinstance(section, DynamicSection):
            for tag in section.iter_tags():
                if tag.entry.d_tag == "DT_NEEDED":
                    result.needed.append(tag.needed)
                if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
                    result.search_paths.append(getattr(tag, tag.entry.d_tag[3:].lower()))
        if isinstance(section, SymbolTableSection) and section.name == ".dynsym":
            for index, symbol in enumerate(section.iter_symbols()):
                result.symbols.append(symbol.name)
                undefined = symbol["st_shndx"] == "SHN_UNDEF" and symbol.name
                weak = symbol["st_info"]["bind"] == "STB_WEAK"
                versioned = versions and isinstance(versions.get_symbol(index)["ndx"], int)
                if undefined and not weak and not versioned:
                    result.unversioned.append(symbol.name)
    return result


def module_faults(name: str, elf: Elf) -> list[str]:
    """Faults of the module `name`: "_cpu", "_cuda" or "_hip"."""
    faults = [f"torch's symbol {symbol}" for symbol in elf.symbols if TORCH.search(symbol)]
    faults += [f"RPATH or RUNPATH {path}" for path in elf.search_paths]
    faults += [f"unlisted shared library {name}" for name in elf.needed if name not in LISTED]
    provided = PROVIDED.get(name, PROVIDED[None])
    faults += [
        f"symbol {symbol}, which no listed library has"
        for symbol in elf.unversioned
        if not provided.match(symbol) and not TORCH.search(symbol)
    ]
    return [f"{name}: {fault}" for fault in faults]


def wheel_faults(path: Path) -> list[str]:
    """Faults of a wheel."""
    faults, modules = [], set()
    megabytes = path.stat().st_size / 1e6
    if megabytes > MAX_MEGABYTES:
        faults.append(f"{megabytes:.1f} MB, expected at most {MAX_MEGABYTES}")
    with zipfile.ZipFile(path) as wheel:
        for name in wheel.namelist():
            module = re.fullmatch(r"fused_sft_loss/(_cpu|_cuda|_hip)\.[^/]*\.so", name)
            if module:
                modules.add(module[1])
                with wheel.open(name) as file:
                    faults += module_faults(module[1], read_elf(file))
            elif "libamdhip64" in name or "libhsa-runtime" in name:
                faults.append(f"a HIP runtime beside torch's: {name}")
            elif re.search(r"\.so\b", name):
                faults.append(f"shared library {name}")
    expected = expected_modules(path.name)
    if modules != expected:
        faults.append(f"expected modules {sorted(expected)} by its name, got {sorted(modules)}")
    return faults


def expected_modules(wheel_name: str) -> set[str]:
    """The modules that the version's suffix promises: 0.1.0+cu13 has _cpu and _cuda."""
    label = wheel_name.split("-")[1].partition("+")[2]
    kinds = [part.rstrip("0123456789") for part in re.split(r"[._]", label) if part]
    return set().union(*(LABELS.get(kind, {kind}) for kind in kinds))


# --- use ------------------------------------------------------------------------------------------

USE = """
import torch, fused_sft_loss as fsl, fused_sft_loss.triton_kernels
from fused_sft_loss.backends import selection
x = torch.randn(2, 5, 300).bfloat16().requires_grad_()
y = torch.randint(0, 300, (2, 5))
loss = fsl.sft_loss(x, y); loss.backward()
want = torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1).float(), y[:, 1:].flatten())
torch.testing.assert_close(loss, want)
print(fsl.__file__, fsl.__version__, selection.resolve(None, "cpu"), float(x.grad.abs().sum()) > 0)
"""

#: _hip needs a HIP runtime in the process: torch's, or the one that is named first.
LOAD = """
import ctypes, sys, fused_sft_loss
from fused_sft_loss.backends import loader
runtime, *modules = sys.argv[1:]
for module in modules:
    if module == "_hip" and not loader.loaded_hip_runtimes():
        if not runtime:
            print("_hip not loaded: there is neither its HIP runtime nor a C compiler here")
            continue
        ctypes.CDLL(runtime)
    loaded = loader.load(module[1:])
    hooks = {"use_isa", "try_line"} & set(dir(loaded))
    assert not hooks, "hooks for tests are for checkouts alone"
    print(module, "loads:", loaded.build_info())
    if "targets" in loaded.build_info():
        print(module, "is built for", loaded.build_info()["targets"])
"""


def hip_runtime(wheel: Path, folder: Path) -> str:
    """A HIP runtime that a wheel's _hip can be loaded with; empty if there is none.

    It is the system's if that has the version of the wheel. Otherwise it is a library with the
    same symbols, which do nothing: enough to load a module, and to know that it needs no others.
    """
    version = re.search(r"rocm(\d+)", wheel.name)
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if name.startswith("fused_sft_loss/_hip.")]
        if not names or not version:
            return ""
        with files.open(names[0]) as file:
            symbols = [name for name in read_elf(file).unversioned if "hip" in name]
    name = f"libamdhip64.so.{version[1]}"
    if ctypes.util.find_library("amdhip64") == name:
        return name
    if not shutil.which("cc"):
        return ""
    source, library = folder.parent / "hip.c", folder.parent / name
    source.write_text("".join(f"void* {symbol}() {{ return 0; }}\n" for symbol in symbols))
    subprocess.run(["cc", "-shared", "-fPIC", "-w", source, "-o", library], check=True)
    return str(library)


def empty_environment(folder: Path) -> Path:
    """The Python of a new virtual environment without our packages.

    torch comes from the current environment, through a .pth file. (Paths in a .pth file are not
    site directories, so an editable install there has no effect.)
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    Path(purelib, "torch-from-outside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install_and_use(wheel: Path, folder: Path) -> tuple[list[str], str]:
    """(the package's path, version, backend, success), and its report."""
    python = str(empty_environment(folder))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--ignore-installed", str(wheel)], check=True)
    used = subprocess.check_output([python, "-c", USE], text=True, cwd=folder).split()
    report = subprocess.check_output([python, "-m", "fused_sft_loss", "env"], text=True, cwd=folder)
    assert Path(used[0]).is_relative_to(folder), used[0]
    loads = [hip_runtime(wheel, folder), *sorted(expected_modules(wheel.name))]
    report += subprocess.check_output([python, "-c", LOAD, *loads], text=True, cwd=folder)
    return used, report


def code_faults(wheel: Path, report: str) -> list[str]:
    """GPU targets that the modules were built for, without code for them in the wheel."""
    faults = []
    for module, targets in wheel_code.modules(wheel):
        built = re.search(rf"^{module} is built for (.*)", report, re.MULTILINE)
        if built:
            lacking = wheel_code.missing_targets(built[1].split(), targets)
            faults += [f"{module}: no code for {target}, got {targets}" for target in lacking]
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--use", action="store_true", help="install each and run the loss")
    arguments = parser.parse_args()
    failed = False
    for wheel in arguments.wheels:
        faults, lines = wheel_faults(wheel), []
        if not faults:
            code = [(module, targets) for module, targets in wheel_code.modules(wheel) if targets]
            lines += [f"{module} has code for {' '.join(targets)}" for module, targets in code]
        if arguments.use and not faults:
            with tempfile.TemporaryDirectory() as folder:
                used, report = install_and_use(wheel.absolute(), Path(folder).resolve() / "venv")
            lines.append(f"installs, and runs the loss with backend {used[2]!r}")
            lines += [f"  {line}" for line in report.splitlines()]
            faults += code_faults(wheel, report)
        failed = failed or bool(faults)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", *lines, sep="\n  ")
        print(*(f"  refused: {fault}\n" for fault in faults), sep="", end="")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

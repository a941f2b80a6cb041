"""Importing the compiled modules: the runtime that they use, and the errors if it is missing."""

import importlib.util
import shutil
import subprocess
import sys

import pytest
from wheel_check import read_elf

from fused_sft_loss.backends import loader


def built(name):
    return importlib.util.find_spec(f"fused_sft_loss.{name}")


def python(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def runtime(tmp_path):
    """Compile a fake HIP runtime with all symbols that `_hip` needs."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    wanted = {"hipInit"}
    if spec := built("_hip"):
        with open(spec.origin, "rb") as file:
            wanted |= {name for name in read_elf(file).unversioned if "hip" in name}
    (tmp_path / "hip.c").write_text("".join(f"void* {name}() {{ return 0; }}" for name in wanted))

    def compile(folder):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "libamdhip64.so.7"
        subprocess.run(["cc", "-shared", "-fPIC", "-w", tmp_path / "hip.c", "-o", path], check=True)
        return path

    return compile


# Like torch, which loads its libraries with local symbols.
LOAD = """
import ctypes, os, sys
for path in sys.argv[1:]:
    ctypes.CDLL(path, mode=os.RTLD_LOCAL)
"""


def test_cuda_loads_on_a_machine_without_a_driver():
    if not built("_cuda"):
        pytest.skip("_cuda was not built here: `python setup.py toolchains` says why")
    done = python("import fused_sft_loss._cuda as m; print(m.build_info()['targets'])")
    assert done.returncode == 0 and "8.0" in done.stdout, done.stderr


def test_hip_takes_the_runtime_that_is_loaded(runtime):
    if not built("_hip"):
        pytest.skip("_hip was not built here: `python setup.py toolchains` says why")
    load = "from fused_sft_loss.backends import loader; m = loader.load('hip')\n"
    show = "print(m.build_info()['targets'], loader.loaded_hip_runtimes() == sys.argv[1:])"
    path = runtime("one")
    done = python(LOAD + load + show, path)
    assert done.returncode == 0 and "gfx" in done.stdout and "True" in done.stdout, done.stderr
    plain = "import fused_sft_loss._hip"  # fails without the loader
    assert "undefined symbol" in python(LOAD + plain, path).stderr


def test_hip_without_a_runtime_says_what_is_missing():
    if loader.loaded_hip_runtimes():
        pytest.skip("this torch brings a HIP runtime")
    with pytest.raises(ImportError, match="no HIP runtime is loaded: torch is not a ROCm build"):
        loader.share_hip_runtime()


def test_a_module_that_was_not_built_is_an_import_error():
    with pytest.raises(ImportError, match="_metal"):
        loader.load("metal")


@pytest.mark.long
def test_two_hip_runtimes_are_named(runtime):
    paths = [runtime("one"), runtime("two")]
    share = """
from fused_sft_loss.backends import loader
assert loader.loaded_hip_runtimes() == sys.argv[1:], loader.loaded_hip_runtimes()
loader.share_hip_runtime()
"""
    done = python(LOAD + share, *paths)
    assert "ImportError: expected one HIP runtime in the process" in done.stderr
    assert all(str(path) in done.stderr for path in paths)
    report = python(LOAD + "from fused_sft_loss.__main__ import main; main(['env'])", *paths)
    assert f"HIP runtime: error: 2 copies in one process: {paths[0]}, {paths[1]}" in report.stdout


# A profiler or a debugger maps a library's file under another name than the one that was loaded.
MAP = """
import mmap
def map(path):
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_EXEC)
"""


@pytest.mark.parametrize("link", ["hardlink_to", "symlink_to"])
def test_two_names_of_one_hip_runtime_are_one(runtime, tmp_path, link):
    path, other = runtime("one"), tmp_path / "two/libamdhip64.so.7.1"
    other.parent.mkdir()
    getattr(other, link)(path)
    both = """
from fused_sft_loss.backends import loader
mapped = map(sys.argv[2])
names = {line.split()[5] for line in open("/proc/self/maps") if "libamdhip64" in line}
print(len(names), len(loader.loaded_hip_runtimes()))
loader.share_hip_runtime()
"""
    load = LOAD.replace("sys.argv[1:]", "sys.argv[1:2]")
    done = python(load + MAP + both, path, other)
    mapped = 2 if link == "hardlink_to" else 1  # the kernel resolves symbolic links
    assert done.stdout.split() == [str(mapped), "1"] and done.returncode == 0, done.stderr


def test_a_hip_runtime_that_was_deleted_is_still_one(runtime):
    """An upgrade in a running container: the path in /proc/self/maps ends in " (deleted)"."""
    show = """
from fused_sft_loss.backends import loader
os.unlink(sys.argv[1])
print(*loader.loaded_hip_runtimes(), sep="|")
"""
    path = runtime("one")
    done = python(LOAD + show, path)
    assert done.stdout.strip() == f"{path} (deleted)", done.stderr


def test_one_hip_runtime_is_in_the_report(runtime):
    path = runtime("one")
    report = python(LOAD + "from fused_sft_loss.__main__ import main; main(['env'])", path)
    assert f"HIP runtime: {path}\n" in report.stdout


@pytest.mark.long
def test_a_shared_runtime_serves_modules_loaded_later(runtime, tmp_path):
    """RTLD_GLOBAL on a loaded library makes its symbols global; nothing is loaded again."""
    (tmp_path / "m.c").write_text("void* hipInit(); void* f() { return hipInit(); }")
    later = tmp_path / "later.so"
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "m.c", "-o", later], check=True)
    share = "from fused_sft_loss.backends import loader; loader.share_hip_runtime()\n"
    use = f"ctypes.CDLL({str(later)!r}, mode=os.RTLD_NOW).f()"
    path = runtime("one")
    assert python(LOAD + share + use, path).returncode == 0
    assert "undefined symbol: hipInit" in python(LOAD + use, path).stderr

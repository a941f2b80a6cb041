"""Wheels and source distributions, built with and without a compiler, and what they link."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from wheel_check import USE, install_and_use, wheel_faults

from csrc.toolchains import compilers, without

ROOT = Path(__file__).parents[2]
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "Makefile", "LICENSE")
FOLDERS = ("csrc", "fused_sft_loss", "triton_kernels")
STEERING = {"FUSED_SFT_LOSS_BUILD", "TORCH_CUDA_ARCH_LIST", "PYTORCH_ROCM_ARCH", without.VARIABLE}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clean copy of the sources. Building in the checkout would reuse files left there."""
    copy = tmp_path_factory.mktemp("source") / "fused_sft_loss"
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    return copy


def files(folder):
    """Relative paths of all files in a folder, without __pycache__."""
    found = (path.relative_to(folder) for path in folder.rglob("*.*"))
    return {path for path in found if "__pycache__" not in path.parts}


def run(command, cwd=None, **environment):
    """Run a process without the variables that steer a build, except those given."""
    inherited = {name: value for name, value in os.environ.items() if name not in STEERING}
    return subprocess.run(
        [str(word) for word in command],
        env={**inherited, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def build(source, out, kind="wheel", **environment):
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", out]
    return run([*command, source], **environment)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_wheel_in_an_empty_environment(source, tmp_path):
    built = build(source, tmp_path / "dist", FUSED_SFT_LOSS_BUILD="cpu")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("fused_sft_loss/_cpu.") for name in names)
    assert {"fused_sft_loss/triton_kernels/__init__.py", "fused_sft_loss/py.typed"} <= set(names)
    assert not any(name.startswith(("triton_kernels/", "tests/", "bench/")) for name in names)
    assert wheel_faults(wheel) == []
    used, report = install_and_use(wheel, tmp_path / "venv")
    assert used[1:] == [f"{VERSION}+cpu", "cpu", "True"]
    assert "takes 'cpu'" in report


@pytest.mark.long
def test_without_a_compiler_it_installs_works_and_says_so(source, tmp_path):
    built = build(source, tmp_path / "dist", PATH="", CXX="")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    used, report = install_and_use(wheel, tmp_path / "venv")
    assert used[2:] == ["eager", "True"]
    assert "takes 'eager'" in report and "install a C++ compiler" in report


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_sdist_has_what_a_build_needs(source, tmp_path):
    assert build(source, tmp_path, kind="sdist").returncode == 0
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"fused_sft_loss-{VERSION}.tar.gz"  # no label of this machine's tools
    shutil.unpack_archive(archive, tmp_path)
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert files(unpacked / "csrc") == files(ROOT / "csrc")
    built = build(unpacked, tmp_path / "dist", FUSED_SFT_LOSS_BUILD="cpu")
    assert built.returncode == 0, built.stdout + built.stderr


def test_sources_include_no_torch_header():
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".pyc"]
    assert len(sources) > 20
    for path in sources:
        assert "#include <torch" not in path.read_text() and "<ATen" not in path.read_text()


def test_kernels_of_an_instruction_set_share_no_function_with_others(tmp_path):
    """The linker could pick the AVX-512 copy for a machine without AVX-512. -O0 inlines nothing
    that may be left out of line."""
    try:
        compiler = compilers.cxx()
    except compilers.Missing as missing:
        pytest.skip(str(missing))
    if not shutil.which("nm"):
        pytest.skip("no nm")
    kernels = tmp_path / "kernels.o"
    source = ROOT / "csrc/cpu/row_kernels.cpp"
    command = [*compiler, "-std=c++17", "-O0", "-fopenmp-simd", "-DFSL_ISA=any"]
    subprocess.run([*command, "-c", source, "-o", kernels], check=True, capture_output=True)
    listed = subprocess.run(["nm", "-C", kernels], check=True, capture_output=True, text=True)
    kinds = [line.split(maxsplit=2)[-2:] for line in listed.stdout.splitlines()]
    assert ["D", "fsl::kernels_any"] in kinds or ["R", "fsl::kernels_any"] in kinds, kinds
    shared = [name for kind, name in kinds if kind in "WVu" and not name.startswith("DW.ref.")]
    assert not shared, shared


def test_import_does_not_need_the_extras():
    """torch is enough: nothing on the way imports triton, megatron, rich or matplotlib."""
    blocked = "import sys\nfor name in ('triton', 'megatron', 'rich', 'matplotlib'):\n"
    blocked += "    sys.modules.setdefault(name, None)\n"
    subprocess.run([sys.executable, "-c", blocked + USE], check=True, cwd=ROOT)


def test_every_package_of_the_sources_is_installed():
    """A folder that pyproject.toml does not list is there in a checkout and absent from a wheel."""
    tomllib = pytest.importorskip("tomllib")  # part of Python from 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    inside = {p.parent for p in (ROOT / "fused_sft_loss").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in inside}
    assert set(project["packages"]) == {*names, "fused_sft_loss.triton_kernels"}

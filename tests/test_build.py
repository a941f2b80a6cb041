"""The package as others get it: wheels, with and without a compiler, and what they link."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from fused_sft_loss.backends import choose

ROOT = Path(__file__).parent.parent
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "Makefile")
FOLDERS = ("csrc", "fused_sft_loss", "triton_kernels")

USE = """
import torch, fused_sft_loss as fsl, fused_sft_loss.triton_kernels
from fused_sft_loss.backends import choose
x = torch.randn(2, 5, 300).bfloat16().requires_grad_()
y = torch.randint(0, 300, (2, 5))
loss = fsl.sft_loss(x, y); loss.backward()
want = torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1).float(), y[:, 1:].flatten())
torch.testing.assert_close(loss, want)
print(fsl.__file__, fsl.__version__, choose.resolve(None, "cpu"), float(x.grad.abs().sum()) > 0)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clean copy of the sources: building in the checkout would reuse what lies there."""
    copy = tmp_path_factory.mktemp("source") / "fused_sft_loss"
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    return copy


def build(source, out, kind="wheel", **environment):
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out)]
    return subprocess.run(
        [*command, str(source)], env={**os.environ, **environment}, capture_output=True, text=True
    )


def empty_environment(folder):
    """A virtual environment with nothing of ours; torch is read from the one the tests run in.

    (Paths in a .pth file are not site directories: an editable install over there has no effect.)
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    Path(purelib, "torch-from-tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install_and_use(wheel, folder):
    python = empty_environment(folder)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    run = [str(python), "-c"]
    used = subprocess.check_output([*run, USE], text=True, cwd=folder).split()
    report = subprocess.check_output(
        [str(python), "-m", "fused_sft_loss", "env"], text=True, cwd=folder
    )
    assert Path(used[0]).is_relative_to(folder)
    return used, report


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_wheel_in_an_empty_environment(source, tmp_path):
    built = build(source, tmp_path / "dist", FUSED_SFT_LOSS_BUILD="cpu")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("fused_sft_loss/_cpu.") for name in names)
    assert "fused_sft_loss/triton_kernels/__init__.py" in names
    assert not any(name.startswith(("triton_kernels/", "tests/", "bench/")) for name in names)
    used, report = install_and_use(wheel, tmp_path / "venv")
    assert used[2:] == ["cpu", "True"]
    assert "takes 'cpu'" in report


def test_without_a_compiler_it_installs_works_and_says_so(source, tmp_path):
    built = build(source, tmp_path / "dist", CXX="no-such-compiler")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    used, report = install_and_use(wheel, tmp_path / "venv")
    assert used[2:] == ["eager", "True"]
    assert "takes 'eager'" in report and "install a C++ compiler" in report


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"FUSED_SFT_LOSS_BUILD": "cpu", "CXX": "no-such-compiler"}, "install g++ or clang"),
        ({"FUSED_SFT_LOSS_BUILD": "cpu,metal"}, "expected names from"),
    ],
)
def test_a_named_backend_that_cannot_be_built_fails_the_build(source, tmp_path, environment, words):
    built = build(source, tmp_path / "dist", **environment)
    assert built.returncode != 0 and words in built.stdout + built.stderr


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_sdist_has_what_a_build_needs(source, tmp_path):
    assert build(source, tmp_path, kind="sdist").returncode == 0
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    built = build(unpacked, tmp_path / "dist", FUSED_SFT_LOSS_BUILD="cpu")
    assert built.returncode == 0, built.stdout + built.stderr


@pytest.mark.skipif(choose.reason_against("cpu", "cpu") is not None, reason="not built")
@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_native_module_knows_nothing_of_torch():
    module = choose.load("cpu")._cpu.__file__
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", module], text=True)
    assert "PyObject" in symbols  # the list is not empty
    for name in ("torch", "c10", "at::", "_ZN2at", "GOMP"):
        assert name not in symbols
    needed = subprocess.check_output(["readelf", "-d", module], text=True)
    assert "NEEDED" in needed and "RPATH" not in needed and "RUNPATH" not in needed
    assert "libgomp" not in needed and "libtorch" not in needed


def test_sources_include_no_torch_header():
    for path in (ROOT / "csrc").iterdir():
        assert "#include <torch" not in path.read_text() and "<ATen" not in path.read_text()


def test_import_does_not_need_the_extras():
    """torch alone: triton, megatron, rich and matplotlib are imported by nothing on the way."""
    blocked = "import sys\nfor name in ('triton', 'megatron', 'rich', 'matplotlib'):\n"
    blocked += "    sys.modules.setdefault(name, None)\n"
    subprocess.run([sys.executable, "-c", blocked + USE], check=True, cwd=ROOT)

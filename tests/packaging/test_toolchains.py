"""setup.py's handling of present and missing toolchains.

Compilers are faked, so the tests run anywhere and fast. `make wheel` uses the real compilers.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from test_build import ROOT, VERSION, build, run
from wheel_check import wheel_faults

from csrc.toolchains import toolkits, without
from csrc.toolchains.variables import named_targets

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")

NVCC = f"""#!{sys.executable}
# Knows sm_80 and sm_90a, notes what it compiles, and has the C++ compiler do it.
import os, re, sys
line = " ".join(sys.argv[1:])
if "--version" in line:
    print("Cuda compilation tools, release 13.0, V13.0.88")
elif unknown := set(re.findall(r"compute_\\w+", line)) - {{"compute_80", "compute_90a"}}:
    sys.exit(f"nvcc fatal   : Unsupported gpu architecture '{{unknown.pop()}}'")
elif "--dryrun" not in line:
    with open(os.path.join(os.path.dirname(__file__), "log"), "a") as log:
        log.write(line + "\\n")
    words, command = iter(sys.argv[1:]), ["c++"]
    for word in words:
        if word in ("-cudart", "-Xlinker"):
            next(words)
        elif word == "-Xcompiler":
            command += next(words).split(",")
        elif not word.startswith(("-gencode", "-fmad")):
            command += ["-x", "c++"] * word.endswith(".cu") + [word]
    os.execvp("c++", command)
"""

BINDINGS = """
#include <Python.h>
#include "tiny.h"
#define NAME(module) PyInit_##module
#define INIT(module) NAME(module)
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, FSL_TARGETS};
PyMODINIT_FUNC INIT(FSL_MODULE)() { return PyModule_Create(&definition); }
"""


@pytest.fixture
def tree(tmp_path):
    """This repository's build scripts, sources of a few lines, and a fake nvcc."""
    tree = tmp_path / "tree"
    (tree / "csrc/gpu").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "Makefile"):
        shutil.copy(ROOT / name, tree)
    folders = {path.parent for path in (ROOT / "fused_sft_loss").rglob("__init__.py")}
    for folder in (*sorted(folders), ROOT / "triton_kernels"):
        (tree / folder.relative_to(ROOT)).mkdir()
        (tree / folder.relative_to(ROOT) / "__init__.py").touch()
    shutil.copytree(ROOT / "csrc/toolchains", tree / "csrc/toolchains")
    (tree / "csrc/gpu/bindings.cpp").write_text(BINDINGS)
    (tree / "csrc/gpu/tiny.h").write_text("#pragma once\n")
    (tree / "csrc/gpu/one.cu").write_text('#include "tiny.h"\nint one() { return 1; }\n')
    (tree / "csrc/gpu/two.cu").write_text("int two() { return 2; }\n")
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    return tree


def setup_py(tree, *arguments, build="cuda", targets="8.0 9.0a", **environment):
    """Run setup.py on the tree, by default for CUDA with the fake nvcc."""
    environment = {"CUDA_HOME": str(tree.parent / "cuda"), **environment}
    environment |= {"TORCH_CUDA_ARCH_LIST": targets} if targets else {}
    environment |= {"FUSED_SFT_LOSS_BUILD": build} if build else {}
    return run([sys.executable, "setup.py", "-q", *arguments], cwd=tree, **environment)


def compiled(tree):
    """The files that the fake nvcc compiled since the last call."""
    log = tree.parent / "cuda/bin/log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return sorted(Path(word).stem for line in lines for word in line.split() if ".cu" in word)


@pytest.mark.parametrize(
    "target, flags",
    [
        ("8.0", ["-gencode=arch=compute_80,code=sm_80"]),
        ("9.0a", ["-gencode=arch=compute_90a,code=sm_90a"]),
        (
            "10.0+PTX",
            [
                "-gencode=arch=compute_100,code=sm_100",
                "-gencode=arch=compute_100,code=compute_100",
            ],
        ),
    ],
)
def test_a_target_becomes_flags_of_nvcc(target, flags):
    assert toolkits.gencode(target) == flags


@pytest.mark.parametrize("text", ["8.0;9.0a;10.0+PTX", "8.0 9.0a  10.0+PTX ", ";8.0,9.0a;10.0+PTX"])
def test_lists_of_targets_are_split_as_torch_does(monkeypatch, text):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert named_targets("TORCH_CUDA_ARCH_LIST") == ["8.0", "9.0a", "10.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " ")
    assert named_targets("TORCH_CUDA_ARCH_LIST") == []


def test_toolchain_and_targets_are_printed(tree):
    done = setup_py(tree, "toolchains")
    assert done.returncode == 0 and done.stdout.split() == ["cuda"]
    assert "_cuda: nvcc 13.0.88, for 8.0 9.0a\n" in done.stderr
    assert "_cpu is left out: FUSED_SFT_LOSS_BUILD is 'cuda'" in done.stderr


@pytest.mark.parametrize(
    "target, words",
    [
        ("12.0", "cannot make '12.0': nvcc fatal   : Unsupported gpu architecture 'compute_120'"),
        ("7.5", "cannot make '7.5': the kernels need 8.0 or newer"),
        ("Hopper", "cannot make 'Hopper': expected something like 8.0;9.0a;10.0+PTX;12.0"),
    ],
)
@pytest.mark.parametrize("named", ["cuda", None])
def test_a_named_target_that_cannot_be_made_fails_the_build(tree, target, words, named):
    done = setup_py(tree, "toolchains", targets=f"8.0;{target}", build=named)
    assert done.returncode != 0 and f"TORCH_CUDA_ARCH_LIST: nvcc 13.0.88 {words}" in done.stderr


def test_a_default_target_that_cannot_be_made_is_left_out_with_a_warning(tree):
    done = setup_py(tree, "toolchains", targets=None)
    assert done.returncode == 0, done.stderr
    for target in ("10.0+PTX", "12.0"):
        words = f"warning: nvcc 13.0.88 cannot make {target}, which is left out: nvcc f"
        assert words in done.stderr
    assert "_cuda: nvcc 13.0.88, for 8.0 9.0a\n" in done.stderr


@pytest.fixture
def bare(tmp_path):
    """Variables of a machine with a C++ compiler and no other."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "c++").symlink_to(shutil.which("c++"))
    return {"PATH": str(folder), "CUDA_HOME": "", "CUDA_PATH": "", "ROCM_PATH": "", "ROCM_HOME": ""}


@pytest.mark.parametrize(
    "backends, variables, words",
    [
        ("cpu", {"PATH": ""}, "no C++ compiler c++; install g++ or clang"),
        ("cpu,cuda", {}, "no nvcc; install the CUDA toolkit"),
        ("cpu,metal", {}, "expected names from cpu, cuda, hip, or none, got 'cpu,metal'"),
        ("none,cpu", {}, "expected names from cpu, cuda, hip, or none, got 'none,cpu'"),
        (",", {}, "expected names from cpu, cuda, hip, or none, got ','"),
    ],
)
def test_a_named_toolchain_that_is_missing_fails_the_build(tree, bare, backends, variables, words):
    done = setup_py(tree, "build", build=backends, **{**bare, **variables})
    assert done.returncode != 0 and "FUSED_SFT_LOSS_BUILD" in done.stderr and words in done.stderr


def test_hip_without_its_headers_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(toolkits, "ROCM_PLACES", [str(tmp_path)])
    monkeypatch.setattr(toolkits, "pip_rocm_roots", lambda: ())
    for name in (*toolkits.ROCM_VARIABLES, without.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    words = f"no HIP headers in {tmp_path}; install ROCm and set ROCM_PATH, or Debian's clang-19"
    with pytest.raises(toolkits.Missing, match=re.escape(words)):
        next(toolkits.hips())


@pytest.mark.parametrize("build", [None, "", " "])
def test_unnamed_toolchains_that_are_missing_are_left_out(tree, bare, build):
    bare["FUSED_SFT_LOSS_WITHOUT"] = "clang"  # HIP's headers may be in /usr
    bare |= {} if build is None else {"FUSED_SFT_LOSS_BUILD": build}
    done = setup_py(tree, "toolchains", build=None, targets=None, **bare)
    assert done.returncode == 0 and done.stdout.split() == ["cpu"], done.stderr
    assert "_cuda is left out: no nvcc; install" in done.stderr
    assert "_hip is left out: no HIP compiler: FUSED_SFT_LOSS_WITHOUT=clang" in done.stderr


@pytest.mark.parametrize("build", [None, "cpu,cuda,hip"])
@pytest.mark.parametrize(
    "variable, value, words",
    [
        ("CXX", "no-such-compiler", "there is no command 'no-such-compiler'; name a C++ compiler"),
        ("CXX", "no-such-cache c++", "there is no command 'no-such-cache'"),
        ("CUDA_HOME", "/nonexistent", "there is no /nonexistent/bin/nvcc; name the CUDA toolkit's"),
        ("CUDA_PATH", "/nonexistent", "there is no /nonexistent/bin/nvcc; name the CUDA toolkit's"),
        ("ROCM_PATH", "/nonexistent", "there is no /nonexistent/include/hip/hip_version.h; name"),
        ("ROCM_HOME", "/nonexistent", "there is no /nonexistent/include/hip/hip_version.h; name"),
        ("PYTORCH_ROCM_ARCH", "gfx1", "cannot make 'gfx1'"),
        ("MAX_JOBS", "0", "expected a whole number, 1 or more, got '0'"),
        ("MAX_JOBS", "-2", "expected a whole number, 1 or more, got '-2'"),
        ("MAX_JOBS", "auto", "expected a whole number, 1 or more, got 'auto'"),
        ("MAX_JOBS", "4.0", "expected a whole number, 1 or more, got '4.0'"),
        ("FUSED_SFT_LOSS_WITHOUT", "hammer", "expected names from all, boost, nvcc, clang"),
    ],
)
def test_a_variable_that_names_something_wrong_is_an_error(tree, build, variable, value, words):
    """Another tool is available in each case, because the fake nvcc's folder is first in PATH. The
    build must not fall back to it."""
    if variable == "PYTORCH_ROCM_ARCH" and not has_hip():
        pytest.skip("no HIP compiler here")
    path = f"{tree.parent / 'cuda/bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {"PATH": path, "CUDA_HOME": "", variable: value}
    done = setup_py(tree, "toolchains", build=build, **variables)
    assert done.returncode == 1 and not done.stdout, done.stdout
    *before, last = done.stderr.splitlines()
    assert last.startswith(f"{variable}: ") and words in last, done.stderr
    assert all(line.startswith("fused_sft_loss: ") for line in before)  # no traceback


def has_hip():
    try:
        return bool(next(toolkits.hips()))
    except toolkits.Missing:
        return False


def test_rebuilds_compile_what_changed_and_no_more(tree):
    done = setup_py(tree, "build")
    assert done.returncode == 0, done.stdout + done.stderr
    assert compiled(tree) == ["one", "two"]
    assert setup_py(tree, "build").returncode == 0 and compiled(tree) == []
    assert setup_py(tree, "build", MAX_JOBS="7").returncode == 0 and compiled(tree) == []
    (tree / "csrc/gpu/tiny.h").write_text("#pragma once\n// changed\n")
    assert setup_py(tree, "build").returncode == 0 and compiled(tree) == ["one"]
    assert setup_py(tree, "build", targets="8.0").returncode == 0
    assert compiled(tree) == ["one", "two"]


def test_two_toolkits_in_turn_do_not_leave_each_other_s_module(tree):
    """Ninja looks at the age of a file, so the module of +cu12 would look like one of +cu13."""
    other = tree.parent / "cuda-12/bin/nvcc"
    other.parent.mkdir(parents=True)
    other.write_text(NVCC.replace("13.0", "12.4"))
    other.chmod(0o755)
    cu12 = {"CUDA_HOME": str(other.parents[1]), "targets": "8.0"}
    for settings, expected, first in (({}, "8.0 9.0a", 1), (cu12, "8.0", 1), ({}, "8.0 9.0a", 0)):
        done = setup_py(tree, "build", **settings)
        assert done.returncode == 0, done.stdout + done.stderr
        (built,) = tree.glob("build/lib*/fused_sft_loss/_cuda.*.so")
        assert f"\0{expected}\0".encode() in built.read_bytes()
        assert settings or compiled(tree) == ["one", "two"] * first


def test_editable_installs_share_what_was_compiled(tree, tmp_path):
    """setuptools deletes the build folder of an editable install; the objects must survive."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    variables = {"CUDA_HOME": str(tree.parent / "cuda"), "FUSED_SFT_LOSS_BUILD": "cuda"}
    for expected in (["one", "two"], []):
        target = ["--target", tmp_path / "target", "--upgrade", "--editable", tree]
        done = run([*pip, *target], **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        assert compiled(tree) == expected
    assert list((tree / "fused_sft_loss").glob("_cuda.*.so"))


def test_a_wheel_says_what_is_inside_and_has_no_leftovers(tree, tmp_path):
    variables = {"CUDA_HOME": str(tree.parent / "cuda"), "TORCH_CUDA_ARCH_LIST": "8.0"}
    assert setup_py(tree, "build").returncode == 0
    (built,) = tree.glob("build/lib*/fused_sft_loss/_cuda.*.so")
    left = built.with_name(built.name.replace("_cuda", "_hip"))
    shutil.copy(built, left)
    done = build(tree, tmp_path / "dist", FUSED_SFT_LOSS_BUILD="cuda", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.startswith(f"fused_sft_loss-{VERSION}+cu13-")
    assert wheel_faults(wheel) == [
        "expected modules ['_cpu', '_cuda'] by its name, got ['_cuda']",
    ]

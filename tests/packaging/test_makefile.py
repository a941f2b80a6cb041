"""`make` lists its goals, and names everything that is missing before it installs anything."""

import shutil
import sys
from pathlib import Path

import pytest
from test_build import run

ROOT = Path(__file__).parents[2]
MAKE = shutil.which("make")

pytestmark = pytest.mark.skipif(not MAKE, reason="no make")

REQUIRED = {
    "Python 3.10 or newer": "apt-get install python3,",
    "Python's venv module": "apt-get install python3-venv",
    "Python.h": "apt-get install python3-dev",
    "the C++ compiler c++": "apt-get install g++",
}


@pytest.fixture
def checkout(tmp_path):
    """The Makefile, the files that it uses before any installation, and an empty PATH."""
    (tmp_path / "bin").mkdir()
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc/toolchains", tmp_path / "csrc/toolchains")
    return tmp_path


def make(checkout, *arguments, **variables):
    unset = ("CXX", "CUDA_HOME", "CUDA_PATH", "ROCM_PATH", "ROCM_HOME")
    unset += ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL")  # set by the make that runs the tests
    variables = {**dict.fromkeys(unset, ""), **variables}
    return run([MAKE, *arguments], cwd=checkout, PATH=str(checkout / "bin"), **variables)


def tool(checkout, name, text=None):
    """Put a program into PATH: a script with `text`, or a link to this machine's program."""
    path = checkout / "bin" / name
    if text is None:
        path.symlink_to(shutil.which(name))
    else:
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    return path


def missing(done):
    """Maps what `make` reports as missing to how to install it."""
    found = {}
    for line in done.stderr.splitlines():
        if line.startswith("missing: "):
            what, install = line.removeprefix("missing: ").split(": ", 1)
            found[what.partition(", to ")[0].partition(" as ")[0]] = install
    return found


@pytest.mark.parametrize("goal", ["demo", "test", "lint", "system"])
def test_all_that_is_missing_is_named_at_once_before_anything_is_installed(checkout, goal):
    before = sorted(checkout.rglob("*"))
    done = make(checkout, goal)
    assert done.returncode != 0
    found = missing(done)
    assert found.keys() == REQUIRED.keys(), done.stderr
    for what, install in REQUIRED.items():
        assert found[what].startswith(install), found
    assert sorted(checkout.rglob("*")) == before


@pytest.mark.parametrize(
    "fails, what",
    [
        ("version_info", "Python 3.10 or newer"),
        ("ensurepip", "Python's venv module"),
        ("Python.h", "Python.h"),
    ],
)
def test_one_that_is_missing_is_named_alone(checkout, fails, what):
    tool(checkout, "c++")
    tool(checkout, "python3", f'case "$2" in *{fails}*) exit 1;; esac; exec {sys.executable} "$@"')
    done = make(checkout, "system")
    assert done.returncode != 0 and missing(done).keys() == {what}, done.stderr
    assert "optional" not in done.stderr


def test_a_compiler_that_is_named_and_missing_is_named(checkout):
    done = make(checkout, "system", PYTHON=sys.executable, CXX="no-such-compiler -m64")
    assert done.returncode != 0
    assert missing(done).keys() == {"the C++ compiler no-such-compiler -m64"}
    tool(checkout, "c++")
    assert not missing(make(checkout, "system", PYTHON=sys.executable, CXX="c++ -m64"))


def test_optional_tools_that_are_absent_are_named_and_do_not_stop_it(checkout):
    tool(checkout, "c++")
    switch = {"FUSED_SFT_LOSS_WITHOUT": "boost,clang"}  # nvcc is not in PATH
    done = make(checkout, "system", PYTHON=sys.executable, **switch)
    assert done.returncode == 0, done.stderr
    boost, nvcc, clang = done.stderr.splitlines()
    assert boost.startswith("optional, absent: Boost.Context; tests that execute GPU kernels on")
    assert boost.endswith("are skipped: apt-get install libboost-context-dev")
    assert nvcc.startswith("optional, absent: nvcc; the CUDA module and the tests of its")
    assert "absent: clang with HIP's headers" in clang and "libamdhip64-dev" in clang


def test_help_is_the_default_and_names_every_verb(checkout):
    tool(checkout, "sed")
    done = make(checkout)
    assert done.returncode == 0 and done.stdout == make(checkout, "help").stdout
    verbs = {line.split()[1] for line in done.stdout.splitlines()}
    text = (checkout / "Makefile").read_text().replace("\\\n", " ")
    phony = {
        word
        for line in text.splitlines()
        if line.startswith(".PHONY:")
        for word in line.split()[1:]
    }
    assert verbs == phony


@pytest.mark.parametrize("sees, python", [(0, "python3"), (1, ".venv/bin/python")])
def test_a_python_whose_torch_sees_a_gpu_is_taken_as_it_is(checkout, sees, python):
    """A cluster's image has a torch for its GPU, and often no network."""
    tool(checkout, "python3", f'case "$2" in *is_available*) exit {sees};; esac; exit 1')
    done = make(checkout, "-n", "gpu", "BUDGET=300")
    assert f"{python} -m bench gpu --budget 300" in done.stdout.splitlines(), done.stderr
    assert ("pip install" in done.stdout) == bool(sees)


def test_the_switch_refuses_a_tool_it_does_not_know(checkout):
    done = make(checkout, "help", PYTHON=sys.executable, FUSED_SFT_LOSS_WITHOUT="hammer")
    assert done.returncode != 0 and "expected names from all, boost" in done.stderr


@pytest.mark.parametrize("names, left_out", [("", False), ("all", True), ("liger,triton", True)])
def test_the_switch_leaves_optional_installations_out(checkout, names, left_out):
    (checkout / ".venv").mkdir()
    (checkout / ".venv/.installed").touch()
    switch = {"FUSED_SFT_LOSS_WITHOUT": names}
    on_its_command_line = [f"{name}={value}" for name, value in switch.items()]
    for done in (
        make(checkout, "-n", "long", PYTHON=sys.executable, **switch),
        make(checkout, "-n", "long", *on_its_command_line, PYTHON=sys.executable),
    ):
        assert done.returncode == 0, done.stderr
        assert ("liger-kernel" not in done.stdout) == left_out
        assert ("megatron-core" not in done.stdout) == (names == "all")

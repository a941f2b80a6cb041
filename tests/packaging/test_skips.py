"""The summary of skipped tests after a run, and the switch that hides optional tools."""

import sys
from pathlib import Path

import pytest
from test_build import run

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests/support"
FILES = {
    "test_whole.py": 'import pytest\npytest.skip("no spanner", allow_module_level=True)\n',
    "test_import.py": 'import pytest\npytest.importorskip("no_such_module")\n',
    "test_parts.py": """
import pytest
@pytest.mark.parametrize("n", range(3))
def test_skipped(n):
    if n:
        pytest.skip("no hammer")
@pytest.mark.skip(reason="no saw")
def test_marked():
    raise AssertionError
@pytest.mark.xfail
def test_expected_to_fail():
    raise AssertionError
""",
}


@pytest.mark.parametrize("workers", [0, 2])
def test_files_skipped_while_they_are_collected_do_not_break_the_summary(tmp_path, workers):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "skips", "-n", str(workers), str(tmp_path)]
    done = run(command, cwd=tmp_path, PYTHONPATH=str(SUPPORT))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "2 tests skipped: no hammer" in lines and "1 test skipped: no saw" in lines
    assert "1 file skipped: no spanner (test_whole.py)" in lines
    assert any(
        line.startswith("1 file skipped: could not import 'no_such_module'") for line in lines
    )


@pytest.mark.long
def test_the_folder_named_gpu_is_not_the_marker_gpu():
    """pytest counts folder names among a test's keywords."""
    file = "tests/gpu/test_ptx_interpreter.py"
    command = [sys.executable, "-m", "pytest", "-q", file, "-k", "missing_barrier"]
    done = run(command, cwd=ROOT, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout and " passed" in done.stdout, done.stdout


def without(names, program):
    """Run Python under the switch, as the Makefile does."""
    environment = {"FUSED_SFT_LOSS_WITHOUT": names, "PYTHONPATH": str(SUPPORT / "without_triton")}
    return run([sys.executable, *program], cwd=ROOT, **environment)


def test_the_switch_refuses_a_tool_it_does_not_know():
    done = without("boost,hammer", ["csrc/toolchains/without.py"])
    assert done.returncode == 1
    assert (
        "expected names from all, boost, nvcc, clang, liger, megatrons, transformers" in done.stderr
    )
    done = without(" boost, nvcc", ["csrc/toolchains/without.py"])
    assert done.stdout.split() == ["boost", "nvcc"]


def test_under_the_switch_nothing_optional_is_found():
    program = """
import sys
sys.path.insert(0, "tests/support")
import codegen_runs, hugging_face, importlib.util
from bench.without_gpu.codegen import toolchains
from bench.without_gpu.simt import build
assert importlib.util.find_spec("triton") is None
assert toolchains.find("cuda") is None and toolchains.find("hip") is None
assert codegen_runs.needs_liger.args == hugging_face.needs_transformers.args == (True,)
print(build.missing())
"""
    done = without("all", ["-c", program])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Boost.Context is absent: FUSED_SFT_LOSS_WITHOUT=all\n"
    done = without("all", ["setup.py", "-q", "toolchains"])
    assert done.stdout == "cpu\n", done.stderr
    for tool in ("nvcc", "HIP compiler"):
        assert f"is left out: no {tool}: FUSED_SFT_LOSS_WITHOUT=all" in done.stderr

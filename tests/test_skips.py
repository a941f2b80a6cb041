"""The lines after a run that say what was not tested, and the switch that leaves tools out."""

import sys
from pathlib import Path

import pytest
from test_build import run

TESTS = Path(__file__).parent
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
    done = run(command, cwd=tmp_path, PYTHONPATH=str(TESTS))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "2 tests skipped: no hammer" in lines and "1 test skipped: no saw" in lines
    assert "1 file skipped: no spanner (test_whole.py)" in lines
    assert any(
        line.startswith("1 file skipped: could not import 'no_such_module'") for line in lines
    )


def without(names, program):
    """A Python process under the switch, as the Makefile starts it."""
    environment = {"FUSED_SFT_LOSS_WITHOUT": names, "PYTHONPATH": str(TESTS / "without_triton")}
    return run([sys.executable, *program], cwd=TESTS.parent, **environment)


def test_the_switch_refuses_a_tool_it_does_not_know():
    done = without("boost,hammer", ["csrc/without.py"])
    assert done.returncode == 1
    assert "expected names from all, boost, nvcc, clang, liger, megatrons, triton" in done.stderr
    assert "got 'boost,hammer'" in done.stderr
    assert without(" boost, nvcc", ["csrc/without.py"]).stdout.split() == ["boost", "nvcc"]


def test_under_the_switch_nothing_optional_is_found():
    program = """
import sys
sys.path.insert(0, "tests")
import codegen_runs, importlib.util, simt_build
from bench.codegen import toolchains
assert importlib.util.find_spec("triton") is None
assert toolchains.find("cuda") is None and toolchains.find("hip") is None
assert codegen_runs.needs_liger.args == (True,)
print(simt_build.missing())
"""
    done = without("all", ["-c", program])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Boost.Context is absent: FUSED_SFT_LOSS_WITHOUT=all\n"
    done = without("all", ["setup.py", "-q", "toolchains"])
    assert done.stdout == "cpu\n", done.stderr
    for tool in ("nvcc", "HIP compiler"):
        assert f"is left out: no {tool}: FUSED_SFT_LOSS_WITHOUT=all" in done.stderr

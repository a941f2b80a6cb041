"""Several toolkits side by side: which ones are found, and which wheel each becomes.

The compilers are scripts that know some targets. `make wheel` uses the real ones.
"""

import os
import re
import shutil
import subprocess

import pytest
from test_build import ROOT

from csrc.toolchains import toolkits, wheels, without

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")

COMPILER = """#!/bin/sh
case "$*" in *--version*) echo "{version}"; exit;; esac
for word; do
    case " {known} $word" in
        *" ${{word##*arch=}} "*) ;;
        *arch=*) echo "unknown: $word" >&2; exit 1;;
    esac
done
"""
#: What nvcc gets after arch= for each target of the wheels.
GENCODE = {
    "8.0": "compute_80,code=sm_80",
    "9.0a": "compute_90a,code=sm_90a",
    "10.0+PTX": "compute_100,code=sm_100 compute_100,code=compute_100",
    "12.0": "compute_120,code=sm_120",
}


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def cuda(root, version, *targets):
    """A CUDA toolkit."""
    known = " ".join(GENCODE[target] for target in targets)
    script(root / "bin/nvcc", COMPILER.format(version=f"V{version}", known=known))
    return root


def rocm(root, version, *targets, compiler="llvm/bin/clang++"):
    """A ROCm toolkit."""
    major, minor = version.split(".")
    header = root / "include/hip/hip_version.h"
    header.parent.mkdir(parents=True)
    header.write_text(f"#define HIP_VERSION_MAJOR {major}\n#define HIP_VERSION_MINOR {minor}\n")
    text = COMPILER.format(version="clang version 22.1.8", known=" ".join(targets))
    script(root / compiler, text)
    return root


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a C++ compiler, a folder for toolkits, and no others."""
    for name in (*toolkits.CUDA_VARIABLES, *toolkits.ROCM_VARIABLES, without.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for name in ("FUSED_SFT_LOSS_BUILD", "TORCH_CUDA_ARCH_LIST", "PYTORCH_ROCM_ARCH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "path").mkdir()
    for tool in ("c++", "sh"):
        (tmp_path / "path" / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    for name in ("ROCM_PLACES", "FURTHER_CUDA", "FURTHER_ROCM"):
        monkeypatch.setattr(toolkits, name, ())
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def planned(machine):
    """{label: (toolkit and targets, variables)} of the wheels that would be built."""
    return {wheel.label: (wheel.about, wheel.variables) for wheel in wheels.wheels(str(machine))}


def test_each_major_version_becomes_a_wheel(machine):
    cuda(machine / "a", "12.4.131", "8.0", "9.0a")
    cuda(machine / "b", "13.0.88", "8.0", "9.0a", "10.0+PTX", "12.0")
    rocm(machine / "c", "5.2", "gfx90a", "gfx942")
    rocm(machine / "d", "7.2", "gfx90a", "gfx942", "gfx950")
    found = planned(machine)
    assert list(found) == ["cpu", "cu12", "cu13", "rocm5", "rocm7"]
    assert found["cpu"][1] == {"FUSED_SFT_LOSS_BUILD": "cpu"}
    cu12 = {"FUSED_SFT_LOSS_BUILD": "cpu,cuda", "CUDA_HOME": str(machine / "a")}
    assert found["cu12"] == ("nvcc 12.4.131, for 8.0 9.0a", cu12)
    assert found["cu13"][0] == "nvcc 13.0.88, for 8.0 9.0a 10.0+PTX 12.0"
    rocm7 = {"FUSED_SFT_LOSS_BUILD": "cpu,hip", "ROCM_PATH": str(machine / "d")}
    about = "clang++ 22.1.8 with HIP 7.2, for gfx90a gfx942 gfx950"  # no folder of this machine
    assert found["rocm7"] == (about, rocm7)


def test_a_build_with_a_wheel_s_variables_takes_that_toolkit(machine, monkeypatch):
    cuda(machine / "old", "12.4.131", "8.0")
    cuda(machine.parent / "on path", "13.0.88", "8.0")
    rocm(machine / "new", "7.2", "gfx942")
    path = f"{machine.parent}/on path/bin{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    found = planned(machine)
    assert list(found) == ["cpu", "cu12", "cu13", "rocm7"]
    for label, find in (("cu12", "cudas"), ("cu13", "cudas"), ("rocm7", "hips")):
        with monkeypatch.context() as context:
            for name, value in found[label][1].items():
                context.setenv(name, value)
            assert next(getattr(toolkits, find)()).label == label


def test_the_toolkit_with_more_targets_is_taken_and_the_other_is_named(machine, capsys):
    cuda(machine / "a", "12.9.86", "8.0", "9.0a", "10.0+PTX")
    cuda(machine / "b", "12.4.131", "8.0", "9.0a")
    cuda(machine / "c", "12.8.93", "8.0", "9.0a", "10.0+PTX")
    assert planned(machine)["cu12"][1]["CUDA_HOME"] == str(machine / "a")
    said = capsys.readouterr().err
    for version, targets in (("12.4.131", "8.0 9.0a"), ("12.8.93", "8.0 9.0a 10.0+PTX")):
        reason = f"nvcc 12.9.86 makes 8.0 9.0a 10.0+PTX, it {targets}"
        assert f"nvcc {version} is left out of +cu12: {reason}\n" in said


def test_wheels_without_a_toolkit_are_named(machine, capsys):
    cuda(machine / "a", "13.0.88", "8.0")
    assert list(planned(machine)) == ["cpu", "cu13"]
    said = capsys.readouterr().err
    assert "+cu12 is left out: no toolkit for it was found; install CUDA 12.8 or newer" in said
    assert "_hip is left out: no HIP headers in" in said and "+cu13 is left out" not in said


def test_a_toolkit_that_does_not_run_is_left_out_and_named(machine, capsys):
    cuda(machine / "a", "12.4.131", "8.0")
    script(machine / "b/bin/nvcc", "#!/bin/sh\nexec /usr/lib/moved/nvcc\n")
    assert list(planned(machine)) == ["cpu", "cu12"]
    assert "nvcc of unknown version is left out: it cannot make '8.0': " in capsys.readouterr().err


@pytest.mark.parametrize("variable", toolkits.CUDA_VARIABLES)
def test_a_named_toolkit_is_the_only_one(machine, monkeypatch, variable):
    cuda(machine / "a", "12.4.131", "8.0")
    named = cuda(machine.parent / "named", "13.0.88", "8.0")
    monkeypatch.setenv(variable, str(named))
    found = planned(machine)
    assert list(found) == ["cpu", "cu13"] and found["cu13"][1]["CUDA_HOME"] == str(named)


def test_a_named_target_leaves_out_the_toolkits_that_cannot_make_it(machine, monkeypatch, capsys):
    cuda(machine / "a", "12.4.131", "8.0", "9.0a")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a;10.0+PTX")
    with pytest.raises(SystemExit, match="nvcc 12.4.131 cannot make '10.0.PTX': unknown: "):
        planned(machine)
    cuda(machine / "b", "13.0.88", "8.0", "9.0a", "10.0+PTX")
    found = planned(machine)
    assert list(found) == ["cpu", "cu13"] and found["cu13"][0].endswith("for 9.0a 10.0+PTX")
    assert "nvcc 12.4.131 is left out: TORCH_CUDA_ARCH_LIST names '10.0" in capsys.readouterr().err


def test_a_backend_that_is_named_and_missing_is_an_error(machine, monkeypatch):
    monkeypatch.setenv("FUSED_SFT_LOSS_BUILD", "cpu,cuda")
    with pytest.raises(SystemExit, match="FUSED_SFT_LOSS_BUILD=cpu,cuda: no nvcc; install"):
        planned(machine)
    monkeypatch.setenv("FUSED_SFT_LOSS_BUILD", "cpu")
    assert list(planned(machine)) == ["cpu"]


def test_usual_folders_are_searched(machine, monkeypatch):
    """Versions installed beside each other, and the link to one of them that installers make."""
    cuda(machine / "cuda-12.8", "12.8.93", "8.0")
    (machine / "cuda").symlink_to(cuda(machine / "cuda-13.0", "13.0.88", "8.0"))
    monkeypatch.setattr(toolkits, "FURTHER_CUDA", (f"{machine}/cuda*",))
    assert [wheel.label for wheel in wheels.wheels()] == ["cpu", "cu12", "cu13"]


def test_12_0_is_a_default_target_of_toolkits_that_know_it(machine, capsys):
    old = cuda(machine / "a", "12.4.131", "8.0", "9.0a")
    new = cuda(machine / "b", "12.8.93", "8.0", "9.0a", "10.0+PTX", "12.0")
    assert toolkits.nvcc_in(str(new)).targets() == ["8.0", "9.0a", "10.0+PTX", "12.0"]
    assert not capsys.readouterr().err
    assert toolkits.nvcc_in(str(old)).targets() == ["8.0", "9.0a"]
    assert "warning: nvcc 12.4.131 cannot make 12.0, which is left out" in capsys.readouterr().err


# --- ROCm that pip installed ----------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["bin/hipcc", "llvm/bin/clang++", "lib/llvm/bin/clang++"])
@pytest.mark.parametrize("variable", toolkits.ROCM_VARIABLES)
def test_rocm_of_pip_is_found_by_its_variable(machine, monkeypatch, variable, compiler):
    """Primus images hold ROCm in site-packages/_rocm_sdk_devel, and no /opt/rocm."""
    root = rocm(machine / "_rocm_sdk_devel", "7.15", "gfx942", "gfx950", compiler=compiler)
    monkeypatch.setenv(variable, str(root))
    found = next(toolkits.hips())
    assert found.command[:2] == (f"{root}/{compiler}", f"--rocm-path={root}")
    assert found.label == "rocm7" and found.targets() == ["gfx942", "gfx950"]


def test_rocm_of_pip_is_found_by_its_command_without_a_variable(machine, monkeypatch):
    root = rocm(machine / "_rocm_sdk_devel", "7.15", "gfx942")
    monkeypatch.setattr(toolkits, "ROCM_PLACES", (str(rocm(machine / "usr", "5.2", "gfx942")),))
    command = f'#!/bin/sh\n[ "$*" = "path --root" ] && echo "{root}"\n'
    script(machine.parent / "path/rocm-sdk", command)
    assert dict(next(toolkits.hips()).variables) == {"ROCM_PATH": str(root)}
    script(machine.parent / "path/rocm-sdk", "#!/bin/sh\necho not initialised >&2; exit 1\n")
    assert dict(next(toolkits.hips()).variables) == {"ROCM_PATH": str(machine / "usr")}


@pytest.mark.skipif(not shutil.which("clang++-19"), reason="no clang++-19")
def test_headers_of_a_distribution_do_not_mix_with_those_of_the_toolkit(machine, monkeypatch):
    """A module was labelled +rocm7 and compiled with HIP 5.2 of /usr/include."""
    root = rocm(machine / "rocm", "99.0", "gfx942", compiler="unused")
    (machine.parent / "path/clang++").symlink_to(shutil.which("clang++-19", path=os.defpath))
    usual = machine / "usr/include"
    rocm(usual.parent, "5.2", compiler="unused")
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", str(usual))  # searched like /usr/include
    toolkit = toolkits.hip_toolkit(str(root), toolkits.hip_compiler(str(root)))
    command = [*toolkit.command, "-nogpuinc", "-x", "c++", "-E", "-dM", "-"]
    text = "#include <hip/hip_version.h>"
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    assert "#define HIP_VERSION_MAJOR 99" in done.stdout


def test_no_page_sets_rocm_path_to_a_folder_that_an_image_may_lack():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert not re.search(r"ROCM_(PATH|HOME)=/opt", page.read_text(encoding="utf-8")), page


def test_the_workflow_builds_each_gpu_wheel_for_every_python():
    """pybind11 needs a wheel for each version that pyproject.toml lists."""
    listed = re.findall(r":: (3\.\d+)\"", (ROOT / "pyproject.toml").read_text())
    workflow = (ROOT / ".github/workflows/wheels.yml").read_text()
    (pythons,) = re.findall(r"python: \[(.*)\]", workflow)
    assert re.findall(r"\"(.*?)\"", pythons) == listed
    (cpu,) = re.findall(r"CIBW_BUILD: \"(.*)\"", workflow)
    assert cpu.split() == [f"cp{version.replace('.', '')}-*" for version in listed]
    shipped = [label for labels in wheels.SHIPPED.values() for label in labels]
    assert re.findall(r"label: (\w+),", workflow) == shipped

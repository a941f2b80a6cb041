"""Each rule of wheel_check.py refuses a bad wheel, and the modules built here pass all rules."""

import importlib.util
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import wheel_check
import wheel_code
from wheel_check import module_faults, read_elf, wheel_faults

needs_cc = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
NAME = "fused_sft_loss-0.1.0{}-cp311-cp311-manylinux_2_34_x86_64.whl"
CLEAN = "int PyLong_AsLong(void*); int f(void* x) { return PyLong_AsLong(x); }"


@pytest.fixture
def module(tmp_path):
    """Compile C into a shared library."""

    def compile(text, *flags, name="module.so"):
        (tmp_path / "module.c").write_text(text)
        command = ["cc", "-shared", "-fPIC", tmp_path / "module.c", "-o", tmp_path / name, *flags]
        subprocess.run(command, check=True)
        return tmp_path / name

    return compile


def faults(path, name="_cpu"):
    with open(path, "rb") as file:
        return module_faults(name, read_elf(file))


@needs_cc
def test_a_clean_module_passes(module):
    assert faults(module(CLEAN, "-lm")) == []


@needs_cc
@pytest.mark.parametrize(
    "symbol", ["_ZN3c105ErrorC1Ev", "_ZN5torch3jit4loadEv", "_ZNK2at6Tensor3sumEv", "GOMP_parallel"]
)
def test_a_symbol_of_torch_is_refused(module, symbol):
    calls = module(f"void {symbol}(void); void f(void) {{ {symbol}(); }}")
    assert faults(calls) == [f"_cpu: torch's symbol {symbol}"]
    assert f"_cpu: torch's symbol {symbol}" in faults(module(f"void {symbol}(void) {{}}"))


@needs_cc
@pytest.mark.parametrize("kind", ["--disable-new-dtags", "--enable-new-dtags"])
def test_a_search_path_is_refused(module, kind):
    path = module(CLEAN, f"-Wl,{kind},-rpath,/opt/rocm/lib")
    assert faults(path) == ["_cpu: RPATH or RUNPATH /opt/rocm/lib"]


@needs_cc
@pytest.mark.parametrize("library", ["libamdhip64.so.7", "libcudart.so.13", "libgomp.so.1"])
def test_a_library_that_not_every_system_has_is_refused(module, tmp_path, library):
    module("void f(void) {}", f"-Wl,-soname,{library}", name=library)
    path = module("void f(void); void g(void) { f(); }", f"-L{tmp_path}", f"-l:{library}")
    assert f"_cpu: unlisted shared library {library}" in faults(path)


@needs_cc
def test_a_symbol_that_nothing_provides_is_refused(module):
    """The linker accepts undefined symbols, because the interpreter's are undefined too."""
    path = module("void forgotten(void); void f(void) { forgotten(); }")
    assert faults(path) == ["_cpu: symbol forgotten, which no listed library has"]
    path = module("void hipLaunchKernel(void); void f(void) { hipLaunchKernel(); }")
    assert faults(path, "_hip") == [] and len(faults(path, "_cuda")) == 1


def archive(folder, label, files):
    """A wheel with these files, {name: content}."""
    path = folder / NAME.format(label)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


@needs_cc
def test_a_wheel_holds_what_its_name_says(module, tmp_path):
    content = module(CLEAN).read_bytes()
    cpu = {"fused_sft_loss/_cpu.abi.so": content}
    both = {**cpu, "fused_sft_loss/_hip.abi.so": content}
    assert wheel_faults(archive(tmp_path, "+cpu", cpu)) == []
    assert wheel_faults(archive(tmp_path, "+rocm7", both)) == []
    assert wheel_faults(archive(tmp_path, "+cu13", cpu)) == [
        "expected modules ['_cpu', '_cuda'] by its name, got ['_cpu']"
    ]
    assert wheel_faults(archive(tmp_path, "+cpu", both)) == [
        "expected modules ['_cpu'] by its name, got ['_cpu', '_hip']"
    ]


@needs_cc
def test_modules_inside_a_wheel_are_read(module, tmp_path):
    content = module(CLEAN, "-Wl,-rpath,/opt/rocm/lib").read_bytes()
    found = wheel_faults(archive(tmp_path, "+cpu", {"fused_sft_loss/_cpu.abi.so": content}))
    assert found == ["_cpu: RPATH or RUNPATH /opt/rocm/lib"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("fused_sft_loss.libs/libamdhip64-1f2e.so.7", "a HIP runtime beside torch's"),
        ("fused_sft_loss.libs/libhsa-runtime64.so.1", "a HIP runtime beside torch's"),
        ("fused_sft_loss/libstray.so", "shared library"),
        ("fused_sft_loss.libs/libgomp-a34b.so.1", "shared library"),
    ],
)
def test_a_bundled_library_is_refused(tmp_path, name, words):
    found = wheel_faults(archive(tmp_path, "", {name: b""}))
    assert found == [f"{words} {name}" if words == "shared library" else f"{words}: {name}"]


def test_a_large_wheel_is_refused(tmp_path):
    path = archive(tmp_path, "", {"fused_sft_loss/data": bytes(21_000_000)})
    assert wheel_faults(path) == ["21.0 MB, expected at most 20"]


def test_a_refusal_is_an_exit_status(tmp_path):
    path = archive(tmp_path, "+cpu", {})
    command = [sys.executable, wheel_check.__file__, path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "refused: expected modules ['_cpu']" in done.stdout


@pytest.mark.parametrize("name", ["_cpu", "_cuda", "_hip"])
def test_the_modules_built_here_keep_the_rules(name):
    spec = importlib.util.find_spec(f"fused_sft_loss.{name}")
    if spec is None:
        pytest.skip(f"{name} was not built here: `python setup.py toolchains` says why")
    with open(spec.origin, "rb") as file:
        elf = read_elf(file)
    assert f"PyInit_{name}" in elf.symbols and elf.needed
    assert module_faults(name, elf) == []


# --- code for GPUs --------------------------------------------------------------------------------


def fatbin(*entries):
    """NVIDIA's fat binary of (kind, chip): 1 is PTX, 2 is machine code."""
    body = b"".join(
        struct.pack("<HHIQ", kind, 0x101, 64, 8) + bytes(12) + struct.pack("<I", chip) + bytes(40)
        for kind, chip in entries
    )
    return struct.pack("<IHHQ", wheel_code.FATBIN, 1, 16, len(body)) + body


def bundle(*targets):
    """clang's offload bundle, without the code."""
    ids = [b"host-x86_64-unknown-linux--"]
    ids += [f"hipv4-amdgcn-amd-amdhsa--{target}".encode() for target in targets]
    table = b"".join(struct.pack("<QQQ", 4096, 0, len(one)) + one for one in ids)
    return wheel_code.BUNDLE + struct.pack("<Q", len(ids)) + table


def with_section(module, tmp_path, name, content):
    """A module whose section `name` is `content`."""
    (tmp_path / "content").write_bytes(content)
    section = f'.section {name},\\"a\\"\\n.incbin \\"{tmp_path}/content\\"\\n.text'
    return module(f'{CLEAN} __asm__("{section}");')


@needs_cc
@pytest.mark.parametrize(
    "name, content, targets",
    [
        (
            ".nv_fatbin",
            fatbin((2, 75)) + bytes(24) + fatbin((2, 80), (2, 100), (1, 100)),
            ["sm_75", "sm_80", "sm_100", "compute_100"],
        ),
        (".hip_fatbin", bundle("gfx90a") + bytes(100) + bundle("gfx950"), ["gfx90a", "gfx950"]),
        (".other", b"nothing", []),
    ],
)
def test_targets_are_read_from_the_code(module, tmp_path, name, content, targets):
    with open(with_section(module, tmp_path, name, content), "rb") as file:
        assert wheel_code.code_targets(file) == targets


@needs_cc
def test_a_target_without_code_is_refused(module, tmp_path):
    content = fatbin((2, 80), (2, 90), (2, 100))
    code = with_section(module, tmp_path, ".nv_fatbin", content).read_bytes()
    wheel = archive(tmp_path, "+cu13", {"fused_sft_loss/_cuda.abi.so": code})
    assert wheel_check.code_faults(wheel, "_cuda is built for 8.0 9.0a 10.0") == []
    got = "got ['sm_80', 'sm_90', 'sm_100']"
    assert wheel_check.code_faults(wheel, "_cuda is built for 8.0 10.0+PTX 12.0\n") == [
        f"_cuda: no code for 10.0+PTX, {got}",
        f"_cuda: no code for 12.0, {got}",
    ]


@pytest.mark.parametrize("name", ["_cuda", "_hip"])
def test_the_modules_built_here_have_code_for_their_targets(name):
    spec = importlib.util.find_spec(f"fused_sft_loss.{name}")
    if spec is None:
        pytest.skip(f"{name} was not built here: `python setup.py toolchains` says why")
    with open(spec.origin, "rb") as file:
        found = wheel_code.code_targets(file)
    content = Path(spec.origin).read_bytes()
    (built,) = set(re.findall(rb"\0((?:\d+\.\d[af]?(?:\+PTX)? ?|gfx\w+ ?)+)\0", content))
    assert wheel_code.missing_targets(built.decode().split(), found) == []

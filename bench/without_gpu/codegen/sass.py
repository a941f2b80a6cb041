"""Read NVIDIA machine code and resources with NVIDIA's disassemblers."""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from ...errors import UserError
from ..chips import CHIPS
from .machine_code import Access, Code, Compiled, Instruction

_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_PREDICATED = re.compile(r"\*/\s+@")
# A routine that ptxas adds to a kernel (such as a division's slow path) has a name, not a .L label.
_LABEL = re.compile(r"^(\.L_x?_?\w+|\$[\w$]+):")
_REGISTER = re.compile(r"\bR(\d+)\b")
_TARGET = re.compile(r"`\(([^)]+)\)")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.([\w$]+)\b.*$", re.M)
_INFO = re.compile(r"^\.nv\.info\.([\w$]+)$", re.M)
_MAX_THREADS = re.compile(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x([0-9a-f]+)")
_USAGE = re.compile(r"^ Function ([\w$]+):\s+(.*)$", re.M)

_SPACES = {"LDG": "global", "STG": "global", "LDL": "local", "STL": "local",
           "LDS": "shared", "STS": "shared", "LD": "global", "ST": "global",
           "LDGSTS": "global"}  # fmt: skip
_FP32 = {"FFMA", "FMUL", "FADD", "HADD2", "HMUL2", "HFMA2", "FADD32I", "FMUL32I", "FFMA32I"}
_FP32X2 = {"FFMA2", "FMUL2", "FADD2"}
_TRANSCENDENTAL = {"MUFU", "F2F", "F2I", "I2F"}
_ISSUE_ONLY = {"LDG", "STG", "LDL", "STL", "LDS", "STS", "LDC", "BAR", "SHFL", "BRA", "EXIT", "NOP",
               "BSSY", "BSYNC", "LD", "ST", "S2R", "CALL", "RET", "WARPSYNC",
               "LDGSTS"}  # fmt: skip


@cache
def tool(name: str) -> str:
    """Path of a disassembler. Triton's wheel and the CUDA toolkit contain them."""
    if triton := importlib.util.find_spec("triton"):
        path = Path(triton.origin).parent / "backends/nvidia/bin" / name
        if path.exists():
            return str(path)
    if path := shutil.which(name):
        return path
    raise UserError(f"{name} is neither in Triton's wheel nor on PATH; pip install triton")


def kernels(cubin: bytes, target: str) -> dict[str, Compiled]:
    """The kernels of a cubin, by mangled name."""
    codes = parse_kernels(_run("nvdisasm", "-c", cubin))
    usage = dict(_USAGE.findall(_run("cuobjdump", "--dump-resource-usage", cubin)))
    bounds = launch_bounds(_run("cuobjdump", "--dump-elf", cubin))
    # From sm_90 on, a kernel's shared memory includes what the system reserves.
    systems = 0 if target == "sm_80" else CHIPS[target].shared_bytes_reserved
    return {
        name: Compiled(code, _resources(usage[name], code, systems, bounds.get(name)))
        for name, code in codes.items()
    }


def launch_bounds(text: str) -> dict[str, int]:
    """Maximum threads per block of each kernel, from a `cuobjdump --dump-elf` listing."""
    _, *parts = _INFO.split(text)
    found = {
        name: _MAX_THREADS.search(body) for name, body in zip(parts[::2], parts[1::2], strict=True)
    }
    return {name: int(bound[1], 16) for name, bound in found.items() if bound}


def _resources(usage: str, code: Code, systems: int, bound: int | None) -> dict[str, int | None]:
    found = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "agprs": 0,
        "sgprs": 0,
        # A spilled register goes to the stack, in local memory; so does a local array.
        "spills": sum(
            bool(i.access) and i.access.space == "local" and i.access.store
            for i in code.instructions
        ),
        "scratch_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": max(0, found["SHARED"] - systems),
        "threads_limit": bound,
    }


def parse_kernels(text: str) -> dict[str, Code]:
    """Parse each section of an `nvdisasm -c` listing."""
    _, *parts = _SECTION.split(text)
    return {name: parse_text(body) for name, body in zip(parts[::2], parts[1::2], strict=True)}


def parse_text(text: str) -> Code:
    """Parse the listing of one kernel."""
    code = Code()
    for line in text.splitlines():
        if label := _LABEL.match(line):
            code.labels[label[1]] = len(code.instructions)
        elif found := _LINE.match(line):
            code.instructions.append(
                _instruction(found[1], found[2], bool(_PREDICATED.search(line)))
            )
    return code


def _instruction(name: str, operands: str, predicated: bool) -> Instruction:
    base = name.partition(".")[0]
    targets, falls_through = (), True
    if base in ("BRA", "CALL"):
        targets = tuple(_TARGET.findall(operands))
        # In "BRA.U UP0, `(.L)" the condition is an operand. A CALL is a jump that comes back.
        falls_through = predicated or "," in operands or base == "CALL"
    elif base in ("EXIT", "RET"):
        falls_through = predicated
    access = _access(base, name)
    return Instruction(
        name=name,
        work=_work(base),
        access=access,
        exp=name.startswith("MUFU.EX2"),
        targets=targets,
        falls_through=falls_through,
        registers=frozenset(map(int, _REGISTER.findall(operands))),
        loaded=_loaded(access, operands),
    )


def _loaded(access: Access | None, operands: str) -> frozenset[int]:
    to = _REGISTER.match(operands)  # no match for LDGSTS, which fills shared memory
    if not access or access.store or access.space != "global" or not to:
        return frozenset()
    return frozenset(range(int(to[1]), int(to[1]) + -(-access.bytes // 4)))


def _access(base: str, name: str) -> Access | None:
    if base not in _SPACES:
        return None
    parts = name.split(".")
    bits = next((int(p) for p in parts if p in ("64", "128", "256")), 32)
    bits = next((int(p[1:]) for p in parts if p in ("U8", "S8", "U16", "S16")), bits)
    return Access(_SPACES[base], base.startswith("ST"), bits // 8, base in ("LD", "ST"))


def _work(base: str) -> str:
    if base in _FP32:
        return "fp32"
    if base in _FP32X2:
        return "fp32x2"
    if base == "IMAD":
        return "imad"
    if base in _TRANSCENDENTAL:
        return "transcendental"
    if base in _ISSUE_ONLY or base.startswith(("U", "R2UR", "S2U")):
        return "other"
    return "alu"


def _run(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool(name), option, file.name], check=True, capture_output=True, text=True
        ).stdout

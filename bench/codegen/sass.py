"""NVIDIA machine code and resources, by the disassemblers that Triton's wheel brings."""

import re
import subprocess
import tempfile
from pathlib import Path

from ..errors import UserError
from .machine_code import Access, Code, Instruction

_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_PREDICATED = re.compile(r"\*/\s+@")
_LABEL = re.compile(r"^(\.L_x?_?\w+):")
_TARGET = re.compile(r"`\(([^)]+)\)")

_SPACES = {"LDG": "global", "STG": "global", "LDL": "local", "STL": "local",
           "LDS": "shared", "STS": "shared", "LD": "global", "ST": "global"}  # fmt: skip
_FP32 = {"FFMA", "FMUL", "FADD", "HADD2", "HMUL2", "HFMA2", "FADD32I", "FMUL32I", "FFMA32I"}
_FP32X2 = {"FFMA2", "FMUL2", "FADD2"}
_TRANSCENDENTAL = {"MUFU", "F2F", "F2I", "I2F"}
_ISSUE_ONLY = {"LDG", "STG", "LDL", "STL", "LDS", "STS", "LDC", "BAR", "SHFL", "BRA", "EXIT", "NOP",
               "BSSY", "BSYNC", "LD", "ST", "S2R", "CALL", "RET", "WARPSYNC"}  # fmt: skip


def tool(name: str) -> str:
    """Path of a disassembler inside Triton's wheel."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        raise UserError(f"expected {name} in Triton's wheel, found none at {path}")
    return str(path)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, stack and local bytes per thread, static shared bytes per block."""
    text = _run("cuobjdump", "--dump-resource-usage", cubin)
    found = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text))
    return {key: int(found[key]) for key in ("REG", "STACK", "SHARED", "LOCAL")}


def parse(cubin: bytes) -> Code:
    return parse_text(_run("nvdisasm", "-c", cubin))


def parse_text(text: str) -> Code:
    """Code of an `nvdisasm -c` listing."""
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
        # "BRA.U UP0, `(.L)": the condition is an operand. Calls here are jumps that come back.
        falls_through = predicated or "," in operands or base == "CALL"
    elif base in ("EXIT", "RET"):
        falls_through = predicated
    return Instruction(
        name=name,
        work=_work(base),
        access=_access(base, name),
        exp=name.startswith("MUFU.EX2"),
        targets=targets,
        falls_through=falls_through,
    )


def _access(base: str, name: str) -> Access | None:
    if base not in _SPACES:
        return None
    parts = name.split(".")
    bits = next((int(p) for p in parts if p in ("64", "128", "256")), 32)
    bits = next((int(p[1:]) for p in parts if p in ("U8", "S8", "U16", "S16")), bits)
    return Access(_SPACES[base], base.startswith("ST"), bits // 8)


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

"""AMD machine code and resources, from the assembly text that the compiler prints."""

import re

from .machine_code import Access, Code, Instruction

_LABEL = re.compile(r"^(\.?[\w$.]+):")
_BYTES = {
    "ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4,
    "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
}  # fmt: skip
_ACCESS = re.compile(r"^(buffer|global|flat|scratch)_(load|store)_(?:lds_)?([a-z]+(?<!x)(?:x\d)?)")
_TRANSCENDENTAL = ("v_exp", "v_log", "v_rcp", "v_rsq", "v_sqrt", "v_sin", "v_cos")


def resources(text: str) -> dict[str, int]:
    """From the metadata note: registers (VGPRs with AGPRs), spills, scratch and LDS bytes."""
    wanted = {
        "vgpr": "vgpr_count", "agpr": "agpr_count", "sgpr": "sgpr_count",
        "vgpr_spills": "vgpr_spill_count", "sgpr_spills": "sgpr_spill_count",
        "scratch": "private_segment_fixed_size", "shared": "group_segment_fixed_size",
    }  # fmt: skip
    return {
        key: int(re.search(rf"^\s+(?:- )?\.{name}:\s*(\d+)", text, re.M)[1])
        for key, name in wanted.items()
    }


def parse_text(text: str) -> Code:
    """Code of the one kernel in an AMDGCN listing."""
    code = Code()
    for line in text.splitlines():
        if line.startswith(".Lfunc_end"):
            break
        line = line.partition(";")[0].rstrip()
        if label := _LABEL.match(line):
            code.labels[label[1]] = len(code.instructions)
        elif line[:1].isspace() and (words := line.split()) and words[0][0] not in ".;":
            code.instructions.append(_instruction(words[0], words[1:]))
    return code


def _instruction(name: str, operands: list[str]) -> Instruction:
    jumps = name.startswith(("s_branch", "s_cbranch"))
    return Instruction(
        name=name,
        work=_work(name),
        access=_access(name),
        exp=name.startswith("v_exp"),
        targets=tuple(operands[:1]) if jumps else (),
        falls_through=name not in ("s_branch", "s_endpgm"),
    )


def _access(name: str) -> Access | None:
    if name.startswith("ds_"):
        return Access("shared", "write" in name, 4)
    found = _ACCESS.match(name)
    if not found:
        return None
    space = "local" if found[1] == "scratch" else "global"
    return Access(space, found[2] == "store", _BYTES[found[3]])


def _work(name: str) -> str:
    if name.startswith(_TRANSCENDENTAL):
        return "transcendental"
    if name.startswith("v_"):
        return "valu"
    if name.startswith("s_") and not name.startswith(("s_waitcnt", "s_nop", "s_barrier", "s_cbr")):
        return "salu"
    return "other"

"""Read AMD machine code and resources from the compiler's assembly text."""

import re

from .machine_code import Access, Code, Compiled, Instruction, innermost_loops

_LABEL = re.compile(r"^(\.?[\w$.]+):")
_REGISTER = re.compile(r"\bv(?:(\d+)\b|\[(\d+):(\d+)\])")
_BYTES = {
    "ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4,
    "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
}  # fmt: skip
_ACCESS = re.compile(r"^(buffer|global|flat|scratch)_(load|store)_(?:lds_)?([a-z]+(?<!x)(?:x\d)?)")
_TRANSCENDENTAL = ("v_exp", "v_log", "v_rcp", "v_rsq", "v_sqrt", "v_sin", "v_cos")


def kernels(text: str) -> dict[str, Compiled]:
    """The kernels of an AMDGCN listing, by mangled name."""
    listing, _, notes = text.partition("\namdhsa.kernels:")
    notes = notes.partition("\namdhsa.target:")[0]
    found = {}
    for note in re.split(r"^  - ", notes, flags=re.M)[1:]:
        name = re.search(r"^\s+\.name:\s*(\S+)", note, re.M)[1]
        body = re.search(rf"^{re.escape(name)}:.*?^\.Lfunc_end", listing, re.M | re.S)[0]
        code = parse_text(body)
        found[name] = Compiled(code, _resources(note, code))
    return found


def _resources(note: str, code: Code) -> dict[str, int]:
    """Resources, from a kernel's metadata note."""

    def number(key):
        return int(re.search(rf"^\s*\.{key}:\s*(\d+)", note, re.M)[1])

    return {
        "registers": number("vgpr_count"),  # includes AGPRs
        "agprs": number("agpr_count"),
        "sgprs": number("sgpr_count"),
        # A spilled SGPR goes to a lane of a VGPR: no memory traffic, but two instructions. They
        # count only in an inner loop; elsewhere they run a few times for a row.
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count") * _moves_lanes(code),
        "scratch_bytes": number("private_segment_fixed_size"),
        "shared_bytes": number("group_segment_fixed_size"),
        "threads_limit": number("max_flat_workgroup_size"),
    }


def _moves_lanes(code: Code) -> bool:
    """Whether an innermost loop moves an SGPR to or from a lane of a VGPR."""
    inner = (instruction for body in innermost_loops(code) for instruction in body)
    return any(instruction.name in ("v_readlane_b32", "v_writelane_b32") for instruction in inner)


def parse_text(text: str) -> Code:
    """Parse the listing of one kernel."""
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
    access = _access(name, operands)
    fills = access and access.space == "global" and not access.store
    return Instruction(
        name=name,
        work=_work(name),
        access=access,
        exp=name.startswith("v_exp"),
        targets=tuple(operands[:1]) if jumps else (),
        falls_through=name not in ("s_branch", "s_endpgm"),
        registers=_registers(operands),
        loaded=_registers(operands[:1]) if fills else frozenset(),
    )


def _registers(operands: list[str]) -> frozenset[int]:
    found = _REGISTER.findall(" ".join(operands))
    return frozenset(
        n for one, low, high in found for n in range(int(one or low), int(one or high) + 1)
    )


def _access(name: str, operands: list[str]) -> Access | None:
    if name.startswith("ds_"):
        return Access("shared", "write" in name, 4)
    found = _ACCESS.match(name)
    if not found:
        return None
    # Before gfx942 a spill is a buffer access with no address operand, to the lane's stack.
    stack = found[1] == "scratch" or (found[1] == "buffer" and "off," in operands)
    space = "local" if stack else "global"
    return Access(space, found[2] == "store", _BYTES[found[3]], found[1] == "flat")


def _work(name: str) -> str:
    if name.startswith(_TRANSCENDENTAL):
        return "transcendental"
    if name.startswith("v_"):
        return "valu"
    if name.startswith("s_") and not name.startswith(("s_waitcnt", "s_nop", "s_barrier", "s_cbr")):
        return "salu"
    return "other"

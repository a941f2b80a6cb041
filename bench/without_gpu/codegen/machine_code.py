"""Instructions of any vendor, their control-flow graph and its loops."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Access:
    """A memory access by each thread."""

    space: str  # "global", "local" (spills, arrays, stacks) or "shared"
    store: bool
    bytes: int
    generic: bool = False  # address space unknown to the compiler: resolved at run time, slower


@dataclass(frozen=True)
class Instruction:
    name: str
    work: str  # class of instruction, as in chips.Limits.lanes
    access: Access | None = None
    exp: bool = False
    targets: tuple[str, ...] = ()  # labels it may jump to
    falls_through: bool = True
    registers: frozenset[int] = frozenset()  # per-thread registers that it names
    loaded: frozenset[int] = frozenset()  # registers that a load of global memory fills


@dataclass
class Code:
    """A kernel in program order; a label maps to the index of the next instruction."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """A kernel's code and resources as compiled."""

    code: Code
    #: registers, agprs, sgprs, spills, scratch_bytes, shared_bytes (static), threads_limit: as in a
    #: record
    resources: dict[str, int | None]


def innermost_loops(code: Code) -> list[list[Instruction]]:
    """Natural loops that contain no other loop, each as instructions in program order."""
    starts, successors = _blocks(code)
    loops = _natural_loops(successors)
    inner = [body for body in loops if not any(other < body for other in loops)]
    ends = [*starts[1:], len(code.instructions)]
    return [
        [i for block in sorted(body) for i in code.instructions[starts[block] : ends[block]]]
        for body in inner
    ]


def outside_loops(code: Code) -> list[Instruction]:
    """The instructions that run once, in program order."""
    starts, successors = _blocks(code)
    inside = frozenset().union(*_natural_loops(successors))
    ends = [*starts[1:], len(code.instructions)]
    return [
        i
        for block in range(len(starts))
        if block not in inside
        for i in code.instructions[starts[block] : ends[block]]
    ]


def _blocks(code: Code) -> tuple[list[int], list[set[int]]]:
    """First instruction of each basic block, and the blocks that may follow it."""
    count = len(code.instructions)
    starts = {0} | {at for at in code.labels.values() if at < count}
    for at, instruction in enumerate(code.instructions):
        if (instruction.targets or not instruction.falls_through) and at + 1 < count:
            starts.add(at + 1)
    ordered = sorted(starts)
    number = {at: block for block, at in enumerate(ordered)}
    successors = []
    for block, _start in enumerate(ordered):
        end = ordered[block + 1] if block + 1 < len(ordered) else count
        last = code.instructions[end - 1]
        follow = {number[code.labels[t]] for t in last.targets if code.labels[t] < count}
        if last.falls_through and end < count:
            follow.add(number[end])
        successors.append(follow)
    return ordered, successors


def _natural_loops(successors: list[set[int]]) -> list[frozenset[int]]:
    """Blocks of each loop: an edge to a dominator, and all blocks that reach it without passing
    the dominator."""
    dominators = _dominators(successors)
    predecessors = _reversed(successors)
    bodies: dict[int, set[int]] = {}
    for block, follow in enumerate(successors):
        for header in follow & dominators[block]:
            body = bodies.setdefault(header, {header})
            pending = [block]
            while pending:
                at = pending.pop()
                if at not in body:
                    body.add(at)
                    pending.extend(predecessors[at])
    return [frozenset(body) for body in bodies.values()]


def _dominators(successors: list[set[int]]) -> list[set[int]]:
    """For each block, the blocks on every path to it; empty for unreachable blocks."""
    predecessors = _reversed(successors)
    reached = _reachable(successors)
    result = [set(reached) if block in reached else set() for block in range(len(successors))]
    result[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in reached - {0}:
            before = [result[p] for p in predecessors[block] if p in reached]
            new = set.intersection(*before) | {block}
            changed |= new != result[block]
            result[block] = new
    return result


def _reachable(successors: list[set[int]]) -> set[int]:
    seen, pending = set(), [0]
    while pending:
        block = pending.pop()
        if block not in seen:
            seen.add(block)
            pending.extend(successors[block])
    return seen


def _reversed(successors: Iterable[set[int]]) -> list[set[int]]:
    successors = list(successors)
    result = [set() for _ in successors]
    for block, follow in enumerate(successors):
        for other in follow:
            result[other].add(block)
    return result

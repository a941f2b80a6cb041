"""The hot loops of a row kernel: what one element of the logits costs in each."""

from collections import Counter
from dataclasses import asdict, dataclass

from .machine_code import Code, Instruction, innermost_loops

#: What a loop is for, by what it does to global memory and whether it takes exponentials.
STATISTICS = "statistics"  # loads, exp
GRADIENT = "gradient"  # loads, exp, stores
ZEROS = "zeros"  # stores
SCALING = "scaling"  # loads, stores

CHUNK = 16  # bytes of a wide load
VECTOR = 8  # logits that a shifted kernel takes in at once


@dataclass(frozen=True)
class Shifted:
    """A kernel that takes in eight logits at any address by aligned loads, shifted into place.

    A lane loads the 16-byte chunks that hold its logits, one more than they fill. The last of them
    is the next lane's first: the L1 cache has it for one of the two.
    """

    exps: int  # per element, which is how elements are counted where there are no stores

    def elements(self, exps: int, stored: int, element_bytes: int) -> int:
        return stored // element_bytes or exps // (self.exps * VECTOR) * VECTOR


@dataclass(frozen=True)
class HotLoop:
    """Counts per element of the logits, unless said."""

    purpose: str
    elements: int  # that a thread takes in per iteration
    instructions: float
    exps: float
    work: dict[str, float]  # instructions by class
    loads_at_once: int  # that a thread waits for together, at most
    requested: float  # bytes that loads ask the L1 cache for
    loaded: float  # bytes among them that are no other lane's too
    stored: float  # bytes
    load_bytes: list[int]  # sizes of the loads, each size once
    store_bytes: list[int]
    local_accesses: int  # per iteration
    generic_accesses: int

    def as_dict(self) -> dict:
        return asdict(self)


def hot_loops(code: Code, element_bytes: int, shifted: Shifted | None = None) -> list[HotLoop]:
    """The main loop of each purpose.

    Beside it lie the loop over the rest of a row (at most one tile) and, where a compiler unrolled,
    a loop over what is left: the one that takes in most per iteration is the main one, and of two
    alike the one with fewer instructions, which is the one without column masks.
    """
    main: dict[str, HotLoop] = {}
    for body in innermost_loops(code):
        loop = count(body, element_bytes, shifted)
        if loop is None:
            continue
        best = main.get(loop.purpose)
        if best is None or (loop.elements, -loop.instructions) > (
            best.elements,
            -best.instructions,
        ):
            main[loop.purpose] = loop
    return list(main.values())


def count(
    body: list[Instruction], element_bytes: int, shifted: Shifted | None = None
) -> HotLoop | None:
    """Counts of a loop over logits of `element_bytes`; None when it moves no global memory."""
    accesses = [i.access for i in body if i.access]
    loads = [a.bytes for a in accesses if a.space == "global" and not a.store]
    stores = [a.bytes for a in accesses if a.space == "global" and a.store]
    exps = sum(i.exp for i in body)
    if loads and exps:
        purpose = GRADIENT if stores else STATISTICS
    elif stores:
        purpose = SCALING if loads else ZEROS
    else:
        return None
    elements, overlap = (sum(loads) or sum(stores)) // element_bytes, 0.0
    if shifted and loads:
        elements = shifted.elements(exps, sum(stores), element_bytes)
        overlap = CHUNK / VECTOR  # bytes per element
    if not elements:
        return None
    return HotLoop(
        purpose,
        elements,
        len(body) / elements,
        exps / elements,
        {work: n / elements for work, n in sorted(Counter(i.work for i in body).items())},
        loads_at_once(body),
        sum(loads) / elements,
        sum(loads) / elements - overlap,
        sum(stores) / elements,
        sorted(set(loads)),
        sorted(set(stores)),
        sum(a.space == "local" for a in accesses),
        sum(a.generic for a in accesses),
    )


def loads_at_once(body: list[Instruction]) -> int:
    """Loads of global memory that no instruction has waited for yet, at most.

    One waits for a load by naming a register that it fills. Twice round, for a loop whose loads are
    for its next iteration.
    """
    pending: list[frozenset[int]] = []
    most = 0
    for instruction in 2 * body:
        pending = [filled for filled in pending if not filled & instruction.registers]
        if instruction.loaded:
            pending.append(instruction.loaded)
        most = max(most, len(pending))
    return most

"""The hot loops of a row kernel: what one element of the logits costs in each."""

from collections import Counter
from dataclasses import asdict, dataclass

from .machine_code import Code, Instruction, innermost_loops

#: What a loop is for, by what it does to global memory and whether it takes exponentials.
STATISTICS = "statistics"  # loads, exp
GRADIENT = "gradient"  # loads, exp, stores
ZEROS = "zeros"  # stores
SCALING = "scaling"  # loads, stores


@dataclass(frozen=True)
class HotLoop:
    """Counts per element of the logits, unless said."""

    purpose: str
    elements: int  # that a thread takes in per iteration
    instructions: float
    exps: float
    work: dict[str, float]  # instructions by class
    loaded: float  # bytes
    stored: float  # bytes
    load_bytes: list[int]  # sizes of the loads, each size once
    store_bytes: list[int]
    local_accesses: int  # per iteration

    def as_dict(self) -> dict:
        return asdict(self)


def hot_loops(code: Code, element_bytes: int) -> list[HotLoop]:
    """The main loop of each purpose.

    Beside it lie the loop over the rest of a row (at most one tile) and, where a compiler unrolled,
    a loop over what is left: the one that takes in most per iteration is the main one, and of two
    alike the one with fewer instructions, which is the one without column masks.
    """
    main: dict[str, HotLoop] = {}
    for body in innermost_loops(code):
        loop = count(body, element_bytes)
        if loop is None:
            continue
        best = main.get(loop.purpose)
        if best is None or (loop.elements, -loop.instructions) > (
            best.elements,
            -best.instructions,
        ):
            main[loop.purpose] = loop
    return list(main.values())


def count(body: list[Instruction], element_bytes: int) -> HotLoop | None:
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
    elements = (sum(loads) or sum(stores)) // element_bytes
    if not elements:
        return None
    return HotLoop(
        purpose,
        elements,
        len(body) / elements,
        exps / elements,
        {work: n / elements for work, n in sorted(Counter(i.work for i in body).items())},
        sum(loads) / elements,
        sum(stores) / elements,
        sorted(set(loads)),
        sorted(set(stores)),
        sum(a.space == "local" for a in accesses),
    )

"""Find the hot loops of a row kernel and count what one logit costs in each."""

from collections import Counter
from dataclasses import asdict, dataclass, replace

from .machine_code import Code, Instruction, innermost_loops, outside_loops

#: Purpose of a loop, from its accesses to global memory and its exponentials.
STATISTICS = "statistics"  # loads, exp
GRADIENT = "gradient"  # loads, exp, stores
ZEROS = "zeros"  # stores
RESCALING = "rescaling"  # loads, stores

#: Loops of a kernel that holds a row in shared memory between statistics and gradient: copy from
#: global to shared memory; shared loads and exp; shared loads, exp and stores. If the last one also
#: copies the next row, only the first row of a block needs the first. ONE_READ is what a row costs:
#: the sum of its loops, or the code that runs once if registers hold the row.
BRINGING, HELD_STATISTICS, HELD_GRADIENT = HELD = ("bringing", "held stats", "held grad")
ONE_READ = "one read"

CHUNK = 16  # bytes of a wide load
VECTOR = 8  # logits that a shifted kernel handles at once


@dataclass(frozen=True)
class Shifted:
    """A kernel that loads eight logits from any address by aligned loads and shifts.

    A lane loads all 16-byte chunks that hold its logits: one more than eight logits fill. The last
    chunk is the next lane's first, so the L1 cache serves it to one of the two.
    """

    exps: int  # per element; gives the count of elements in a loop without stores

    def elements(self, exps: int, stored: int, element_bytes: int) -> int:
        return stored // element_bytes or exps // (self.exps * VECTOR) * VECTOR


@dataclass(frozen=True)
class HotLoop:
    """Counts per element of the logits, unless a field says otherwise."""

    purpose: str
    elements: int  # handled by a thread per iteration
    instructions: float
    exps: float
    work: dict[str, float]  # instructions by class
    loads_at_once: int  # largest number of loads that a thread has in flight
    requested: float  # bytes that loads ask the L1 cache for
    loaded: float  # requested bytes, without those that another lane loads too
    stored: float  # bytes
    load_bytes: list[int]  # sizes of the loads, each size once
    store_bytes: list[int]
    local_accesses: int  # per iteration
    generic_accesses: int

    def as_dict(self) -> dict:
        return asdict(self)


def hot_loops(code: Code, element_bytes: int, shifted: Shifted | None = None) -> list[HotLoop]:
    """The main loop of each purpose; for a row held on chip, also the sum of its three loops.

    A kernel has more loops of the same purpose: one over the rest of a row (at most one tile) and,
    if the compiler unrolled, one over the remainder. The main loop handles the most elements per
    iteration. Among equals it has the fewest instructions, because it has no column masks.
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
    if all(purpose in main for purpose in HELD):
        of_a_row = HELD[1:] if main[HELD_GRADIENT].loaded else HELD
        sums = _together([main[purpose] for purpose in of_a_row])
        main[ONE_READ] = replace(sums, loads_at_once=main[BRINGING].loads_at_once)
    return list(main.values())


def one_read_from_registers(code: Code, element_bytes: int) -> HotLoop | None:
    """The cost of a row held in registers, where everything is unrolled: all code outside loops.
    A little of that code processes no elements. None if the kernel holds no row."""
    body = outside_loops(code)
    wide = [i for i in body if not i.access or i.access.bytes == CHUNK]
    loop = count(wide, element_bytes)
    if not loop or loop.purpose != GRADIENT:
        return None
    return replace(loop, purpose=ONE_READ, instructions=len(body) / loop.elements)


def _together(loops: list[HotLoop]) -> HotLoop:
    def total(key):
        return sum(getattr(loop, key) for loop in loops)

    def either(key):
        return sorted(set().union(*(getattr(loop, key) for loop in loops)))

    work = Counter()
    for loop in loops:
        work.update(loop.work)
    return HotLoop(
        ONE_READ,
        min(loop.elements for loop in loops),
        *map(total, ("instructions", "exps")),
        dict(sorted(work.items())),
        max(loop.loads_at_once for loop in loops),
        *map(total, ("requested", "loaded", "stored")),
        *map(either, ("load_bytes", "store_bytes")),
        *map(total, ("local_accesses", "generic_accesses")),
    )


def count(
    body: list[Instruction], element_bytes: int, shifted: Shifted | None = None
) -> HotLoop | None:
    """Counts of a loop over logits of `element_bytes`; None if the loop reads no logits."""
    accesses = [i.access for i in body if i.access]
    exps = sum(i.exp for i in body)
    loads, stores, read, kept = (
        [a.bytes for a in accesses if (a.space, a.store) == kind]
        for kind in (("global", False), ("global", True), ("shared", False), ("shared", True))
    )
    copied = any(i.name.startswith("LDGSTS") for i in body)
    wide = [n for n in read if n == CHUNK]
    purpose = _purpose(
        bool(loads) and not (copied and exps), bool(stores), bool(exps), kept or copied, bool(wide)
    )
    if purpose is None:
        return None
    moved = wide if purpose == HELD_STATISTICS else loads or stores
    elements, overlap = sum(moved) // element_bytes, 0.0
    if shifted and loads:
        elements = shifted.elements(exps, sum(stores) + sum(kept), element_bytes)
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


def _purpose(loads: bool, stores: bool, exps: bool, to_shared: bool, wide: bool) -> str | None:
    """`loads`: of logits that the loop itself uses; it may also copy some for later."""
    if loads and exps:
        return GRADIENT if stores else STATISTICS
    if stores:
        return RESCALING if loads else HELD_GRADIENT if exps else ZEROS
    if loads and to_shared:
        return BRINGING
    return HELD_STATISTICS if wide and exps else None


def loads_at_once(body: list[Instruction]) -> int:
    """The most loads of global memory in flight at once.

    An instruction waits for a load if it names a register that the load fills. The body is walked
    twice, for loops whose loads serve the next iteration. A loop with copies to shared memory waits
    for them after its end, so it has at least all its copies in flight.
    """
    if asynchronous := sum(i.name.startswith("LDGSTS") for i in body):
        return asynchronous
    pending: list[frozenset[int]] = []
    most = 0
    for instruction in 2 * body:
        pending = [filled for filled in pending if not filled & instruction.registers]
        if instruction.loaded:
            pending.append(instruction.loaded)
        most = max(most, len(pending))
    return most

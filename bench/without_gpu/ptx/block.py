"""One block: registers, program counters and shared memory of its threads."""

import re

import numpy as np

from . import arithmetic
from .convert import compare, convert, pack, unpack
from .memory import check_alignment, gather, scatter
from .values import FLOAT, RAW, raw, size_of, typed

_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_VECTOR = {"v2": 2, "v4": 4, "v8": 8}
_IGNORED = {"membar", "fence", "prefetch", "discard", "griddepcontrol"}
WARP = 32
WINDOW = RAW(1 << 56)  # generic address where shared memory starts
POISON = 0xFF  # unwritten shared memory: NaN as a number, outside every buffer as an address


class Block:
    def __init__(self, machine, kernel, number, grid, threads, parameters, dynamic_shared):
        self.machine, self.kernel, self.counts = machine, kernel, machine.counts
        self.threads, self.parameters = threads, parameters
        self.lanes = np.arange(threads)
        self.counter = np.zeros(threads, np.int64)
        self.waiting = np.zeros(threads, bool)
        self.done = np.zeros(threads, bool)
        self.registers: dict[str, np.ndarray] = {}
        self.predicates: dict[str, np.ndarray] = {}
        # Compilers read unwritten registers and discard the result. This value is a large float
        # and an address outside every buffer.
        self.unwritten = np.full(threads, 0x6EADBEEF6EADBEEF, RAW)
        static = -(-kernel.shared_bytes // 128) * 128
        self.shared = np.full(static + dynamic_shared, POISON, np.uint8)
        self.copies: list[tuple] = []  # in flight: lanes, shared offsets, global addresses
        self.special = {
            "%tid.x": self.lanes, "%ctaid.x": number, "%ntid.x": threads, "%nctaid.x": grid,
            "%laneid": self.lanes % WARP, "%warpid": self.lanes // WARP,
        }  # fmt: skip
        for axis in "yz":
            self.special |= {f"%tid.{axis}": 0, f"%ctaid.{axis}": 0}
            self.special |= {f"%ntid.{axis}": 1, f"%nctaid.{axis}": 1}

    def ready(self):
        return ~self.done & ~self.waiting

    def step(self, among) -> bool:
        """Execute one instruction of the lanes that are furthest behind; False if none can run."""
        able = self.ready() & among
        if not able.any():
            return False
        at = int(self.counter[able].min())
        lanes = able & (self.counter == at)
        instruction = self.kernel.code[at]
        warps = len(np.unique(self.lanes[lanes] // WARP))
        self.counts.instructions[instruction.name] += warps
        self.counter[lanes] = at + 1
        if instruction.guard:
            chosen = self.predicates[instruction.guard]
            lanes = lanes & (~chosen if instruction.guard_is_inverted else chosen)
        if lanes.any():
            self._execute(instruction, lanes)
        if self.waiting.any() and (self.waiting | self.done).all():
            self.waiting[:] = False
        return True

    def _execute(self, i, lanes) -> None:
        if i.name == "bra":
            self.counter[lanes] = self.kernel.labels[i.operands[0]]
        elif i.name in ("ret", "exit"):
            if any((of & lanes).any() for of, _, _ in self.copies):
                raise RuntimeError("a thread exits with a copy under way")
            self.done |= lanes
        elif i.name in ("bar", "barrier"):
            if "sync" not in i.modifiers or i.operands[0] != "0":
                raise NotImplementedError(i.text)
            self.waiting |= lanes
        elif i.name == "cp":
            self._copy(i, lanes)
        elif i.name in ("ld", "st"):
            self._access(i, lanes)
        elif i.name in ("shfl", "redux", "vote"):
            self._exchange(i, lanes)
        elif i.name == "mov":
            self._move(i, lanes)
        elif i.name == "setp":
            other = self.read_predicate(i.operands[3]) if len(i.operands) > 3 else None
            a, b = (self.read(o, i.kind) for o in i.operands[1:3])
            self.write_predicate(i.operands[0], compare(i, a, b, other), lanes)
        elif i.name == "selp":
            a, b = (self.read(o, i.kind) for o in i.operands[1:3])
            self.write(i.operands[0], np.where(self.read_predicate(i.operands[3]), a, b), lanes)
        elif i.name == "cvt":
            source = i.modifiers[-1]
            bits = convert(i, [self.read(o, source) for o in i.operands[1:]])
            self.write(i.operands[0], bits, lanes)
        elif i.name == "cvta":
            self._change_space(i, lanes)
        elif i.kind == "pred":
            self._logic(i, lanes)
        elif i.name in arithmetic.HANDLED:
            self.counts.exps += int(lanes.sum()) if i.name == "ex2" else 0
            kinds = arithmetic.operand_kinds(i)
            operands = [self.read(o, k) for o, k in zip(i.operands[1:], kinds, strict=True)]
            self.write(i.operands[0], arithmetic.compute(i, operands), lanes)
        elif i.name not in _IGNORED:
            raise NotImplementedError(i.text)

    def read(self, operand: str, kind: str):
        """Raw bits of a register, special register, symbol or literal, for every lane."""
        if operand[0] == "%":
            if operand in self.special:
                return np.broadcast_to(np.asarray(self.special[operand], RAW), self.threads)
            return self.registers.get(operand, self.unwritten)
        if operand[:2] in ("0f", "0F", "0d", "0D"):
            size = 4 if operand[1] in "fF" else 8
            value = np.array([int(operand[2:], 16)], f"u{size}").view(FLOAT[size])
            bits = raw(value, kind if kind[0] == "f" and len(kind) == 3 else f"f{8 * size}")[0]
        elif operand in self.kernel.shared:
            bits = self.kernel.shared[operand]
        elif operand in self.kernel.parameters:
            bits = self.kernel.parameters[operand].offset
        else:
            bits = int(operand.rstrip("U"), 0) & 0xFFFFFFFFFFFFFFFF
        return np.full(self.threads, bits, RAW)

    def write(self, register: str, bits, lanes) -> None:
        if register == "_":
            return
        old = self.registers.get(register, self.unwritten)
        self.registers[register] = np.where(lanes, bits, old)

    def read_predicate(self, operand: str):
        if operand[0] == "!":
            return ~self.read_predicate(operand[1:])
        if operand[0] != "%":
            return np.full(self.threads, bool(int(operand, 0)))
        return self.predicates[operand]

    def write_predicate(self, register: str, value, lanes) -> None:
        old = self.predicates.get(register, np.zeros(self.threads, bool))
        self.predicates[register] = np.where(lanes, value, old)

    def _logic(self, i, lanes) -> None:
        a, *rest = (self.read_predicate(o) for o in i.operands[1:])
        operation = {"mov": lambda: a, "not": lambda: ~a, "and": lambda: a & rest[0],
                     "or": lambda: a | rest[0], "xor": lambda: a ^ rest[0]}  # fmt: skip
        self.write_predicate(i.operands[0], operation[i.name](), lanes)

    def _move(self, i, lanes) -> None:
        to, source = i.operands
        if i.kind == "pred":
            self._logic(i, lanes)
        elif to[0] == "{":
            names = _names(to)
            parts = unpack(self.read(source, i.kind), len(names), size_of(i.kind) // len(names))
            for name, part in zip(names, parts, strict=True):
                self.write(name, part, lanes)
        elif source[0] == "{":
            names = _names(source)
            size = size_of(i.kind) // len(names)
            parts = [self.read(name, f"b{8 * size}") for name in names]
            self.write(to, pack(parts, size), lanes)
        else:
            self.write(to, self.read(source, i.kind), lanes)

    def _change_space(self, i, lanes) -> None:
        """cvta: between generic addresses and a space. Global addresses are generic ones."""
        address = self.read(i.operands[1], "u64")
        if "shared" in i.modifiers:
            address = address - WINDOW if "to" in i.modifiers else address + WINDOW
        elif "global" not in i.modifiers:
            raise NotImplementedError(i.text)
        self.write(i.operands[0], address, lanes)

    def _exchange(self, i, lanes) -> None:
        """Shuffles, reductions, votes: all running lanes of the warp must execute them together."""
        warp = self.lanes // WARP
        for number in np.unique(warp[lanes]):
            if not lanes[(warp == number) & ~self.done].all():
                raise RuntimeError(f"expected all lanes of warp {number} at: {i.text}")
        if i.name == "redux":
            self.write(i.operands[0], self._reduced(i, lanes, warp), lanes)
            return
        if i.name == "vote":
            self.write(i.operands[0], self._ballot(i, warp), lanes)
            return
        to, *valid = i.operands[0].split("|")
        amount, clamp = (self.read(o, "u32").astype(np.int64) for o in i.operands[2:4])
        source, inside = _shuffle_source(i.modifiers[1], self.lanes % WARP, amount, clamp)
        bits = self.read(i.operands[1], "b32")
        self.write(to, bits[warp * WARP + source], lanes)
        if valid:
            self.write_predicate(valid[0], inside, lanes)

    def _reduced(self, i, lanes, warp):
        values = typed(self.read(i.operands[1], i.kind), i.kind)
        strict = "NaN" in i.modifiers
        operation = {
            "add": np.add, "min": np.minimum if strict else np.fmin,
            "max": np.maximum if strict else np.fmax, "and": np.bitwise_and, "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[i.modifiers[1]]  # fmt: skip
        result = np.zeros_like(values)
        for number in np.unique(warp[lanes]):
            mine = lanes & (warp == number)
            result[mine] = operation.reduce(values[mine])
        return raw(result, i.kind)

    def _ballot(self, i, warp):
        if i.modifiers[:2] != ("sync", "ballot"):
            raise NotImplementedError(i.text)
        bits = self.read_predicate(i.operands[1]).astype(RAW) << (self.lanes % WARP).astype(RAW)
        return np.bitwise_or.reduceat(bits, np.arange(0, self.threads, WARP))[warp]

    def _access(self, i, lanes) -> None:
        store = i.name == "st"
        place, registers = i.operands if store else i.operands[::-1]
        names = _names(registers)
        size = size_of(i.kind)
        if len(names) != max([_VECTOR[m] for m in i.modifiers if m in _VECTOR], default=1):
            raise NotImplementedError(i.text)
        spaces = ("global", "shared", "param", "local", "generic")
        words = (m.partition("::")[0] for m in (*i.modifiers, "generic"))
        space = next(word for word in words if word in spaces)
        addresses = self._address(place)
        if space == "generic" and (addresses[lanes] >= WINDOW).all():
            space, addresses = "shared", addresses - WINDOW
        check_alignment(addresses[lanes], size * len(names))
        for name, flat, offsets, inside in self._find(space, addresses, lanes, size * len(names)):
            warps = self.lanes[inside] // WARP
            self.counts.moved(name, store, warps, offsets[inside], size * len(names))
            if not store and space in ("global", "generic"):
                self.counts.saw(name, flat.size, offsets[inside], size * len(names))
            for part, register in enumerate(names):
                at = offsets[inside] + RAW(part * size)
                if store:
                    scatter(flat, at, size, self.read(register, i.kind)[inside])
                else:
                    bits = np.zeros(self.threads, RAW)
                    bits[inside] = _extended(gather(flat, at, size), i.kind)
                    self.write(register, bits, inside)

    def _copy(self, i, lanes) -> None:
        """cp.async of 16 bytes, and the wait for all copies of a thread.

        A copy may happen at any time up to the wait: by default at the wait, and in a random order
        of warps also at once.
        """
        if i.modifiers[:2] == ("async", "wait_all"):
            for of, to, source in self.copies:
                now = of & lanes
                if now.any():
                    self._copy_now(now, to, source)
            self.copies = [(of & ~lanes, to, s) for of, to, s in self.copies if (of & ~lanes).any()]
            return
        if i.modifiers != ("async", "cg", "shared", "global") or i.operands[2] != "16":
            raise NotImplementedError(i.text)
        to, source = (self._address(place) for place in i.operands[:2])
        check_alignment(to[lanes], 16)
        check_alignment(source[lanes], 16)
        if self.machine.random is not None and self.machine.random.integers(2):
            self._copy_now(lanes, to, source)
            return
        self.copies.append((lanes.copy(), to, source))

    def _copy_now(self, lanes, to, source) -> None:
        if (to[lanes] + RAW(16) > RAW(self.shared.size)).any():
            raise MemoryError(f"copy of 16 bytes outside shared memory of {self.shared.size}")
        for name, flat, offsets, inside in self._find("global", source, lanes, 16):
            self.counts.moved(name, False, self.lanes[inside] // WARP, offsets[inside], 16)
            self.counts.saw(name, flat.size, offsets[inside], 16)
            for half in (0, 8):
                bits = gather(flat, offsets[inside] + RAW(half), 8)
                scatter(self.shared, to[inside] + RAW(half), 8, bits)

    def _address(self, place: str):
        base, offset = _ADDRESS.fullmatch(place).groups()
        return self.read(base, "u64") + RAW(int(offset or "0", 0) & 0xFFFFFFFFFFFFFFFF)

    def _find(self, space, addresses, lanes, size):
        if space in ("global", "generic"):
            masked = np.where(lanes, addresses, addresses[lanes][0])
            for name, flat, offsets, inside in self.machine.memory.find(masked, size):
                yield name, flat, offsets, inside & lanes
            return
        if space == "local":
            raise NotImplementedError("local memory")
        flat = self.parameters if space == "param" else self.shared
        offsets = addresses & RAW(0xFFFFFFFF)
        if (offsets[lanes] + RAW(size) > RAW(flat.size)).any():
            raise MemoryError(f"access of {size} bytes outside {space} memory of {flat.size}")
        yield space, flat, offsets, lanes


def _extended(bits, kind: str):
    """A signed load extends its sign over the register."""
    if kind[0] != "s":
        return bits
    return typed(bits, kind).astype(np.int64).view(RAW)


def _shuffle_source(mode: str, lane, amount, clamp):
    """(source lane, whether it is inside the segment) for each lane, as in the PTX manual."""
    bound, segment = clamp & 31, (clamp >> 8) & 31
    most, least = (lane & segment) | (bound & ~segment), lane & segment
    source, inside = {
        "up": lambda: (lane - amount, lane - amount >= most),
        "down": lambda: (lane + amount, lane + amount <= most),
        "bfly": lambda: (lane ^ amount, (lane ^ amount) <= most),
        "idx": lambda: (least | (amount & ~segment), (least | (amount & ~segment)) <= most),
    }[mode]()
    return np.where(inside, source, lane), inside


def _names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]

"""Buffers of global memory, and counts of the bytes moved."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .values import RAW


@dataclass
class Counts:
    """Executed work: bytes by buffer (or "shared", "param"), and warp instructions by name.

    Lanes of a warp that access the same address count once.
    """

    loaded: Counter = field(default_factory=Counter)
    stored: Counter = field(default_factory=Counter)
    widths: dict = field(default_factory=dict)  # (buffer, size of an access) -> bytes
    seen: dict = field(default_factory=dict)  # global buffer -> mask of the bytes loaded
    instructions: Counter = field(default_factory=Counter)  # one per warp
    exps: int = 0  # one per lane

    def moved(self, name: str, store: bool, warps, offsets, size: int) -> None:
        """Lanes of `warps` access `size` bytes at `offsets` of a buffer."""
        total = size * len(np.unique(offsets + (warps.astype(RAW) << RAW(48))))
        (self.stored if store else self.loaded)[name] += total
        self.widths[name, size] = self.widths.get((name, size), 0) + total

    def saw(self, name: str, room: int, offsets, size: int) -> None:
        """Lanes load `size` bytes at `offsets` of a buffer of `room` bytes."""
        seen = self.seen.setdefault(name, np.zeros(room, bool))
        seen[offsets.astype(np.int64)[:, None] + np.arange(size)] = True

    def touched(self, name: str) -> int:
        """Bytes of a global buffer that were loaded at least once."""
        return int(self.seen[name].sum()) if name in self.seen else 0

    @property
    def warp_instructions(self) -> int:
        return sum(self.instructions.values())


class Global:
    """Named numpy arrays. A kernel sees each array at its address in this process."""

    def __init__(self):
        self.names, self.starts, self.bytes = [], [], []

    def add(self, name: str, array) -> int:
        """Add a contiguous numpy array, which kernels access in place; returns its address."""
        if not array.flags.c_contiguous:
            raise ValueError("expected a contiguous array")
        flat = array.reshape(-1).view(np.uint8)
        start = array.ctypes.data
        for other, begin, held in zip(self.names, self.starts, self.bytes, strict=True):
            if start < begin + held.size and begin < start + flat.size:
                raise ValueError(f"{name} overlaps {other}")
        self.names.append(name)
        self.starts.append(start)
        self.bytes.append(flat)
        return start

    def find(self, addresses, size: int):
        """Yields (name, bytes, offsets, mask of lanes) for each buffer that lanes access."""
        left = np.ones(addresses.shape, bool)
        for name, start, flat in zip(self.names, self.starts, self.bytes, strict=True):
            offsets = addresses - RAW(start)  # below the start it wraps to a large number
            inside = left & (offsets < RAW(flat.size))
            if inside.any():
                if (offsets[inside] > RAW(max(flat.size - size, 0))).any() or flat.size < size:
                    raise MemoryError(f"access of {size} bytes runs over the end of {name}")
                left &= ~inside
                yield name, flat, offsets, inside
        if left.any():
            where = ", ".join(hex(int(a)) for a in addresses[left][:4])
            raise MemoryError(f"access of {size} bytes outside every buffer, at {where}")


def check_alignment(addresses, size: int) -> None:
    if (addresses % RAW(size)).any():
        raise MemoryError(f"access of {size} bytes that is not aligned to them")


def gather(flat, offsets, size: int):
    """Raw little-endian numbers of `size` bytes at byte offsets."""
    wide = np.zeros((len(offsets), 8), np.uint8)
    wide[:, :size] = flat[offsets.astype(np.int64)[:, None] + np.arange(size)]
    return wide.view(RAW)[:, 0]


def scatter(flat, offsets, size: int, bits) -> None:
    wide = np.ascontiguousarray(bits).view(np.uint8).reshape(-1, 8)
    flat[offsets.astype(np.int64)[:, None] + np.arange(size)] = wide[:, :size]

"""Registers hold 64 raw bits per lane. Convert these bits to PTX types and back."""

import re

import numpy as np

RAW = np.uint64
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOAT = {2: np.float16, 4: np.float32, 8: np.float64}
PACKED = {"bf16x2": 4, "f16x2": 4, "f32x2": 8}


def size_of(kind: str) -> int:
    """Bytes of a PTX type such as `u32`, `bf16` or `f32x2`."""
    if kind in PACKED:
        return PACKED[kind]
    return int(re.fullmatch(r"(?:bf|[busf])(\d+)", kind)[1]) // 8


def is_float(kind: str) -> bool:
    return kind[0] == "f" or kind == "bf16"


def typed(bits, kind: str):
    """Raw bits as numbers: bf16 becomes float32, other types their numpy type."""
    size = size_of(kind)
    if kind == "bf16":
        return (bits.astype(np.uint16).astype(np.uint32) << 16).view(np.float32)
    plain = bits.astype(UNSIGNED[size])
    if kind[0] == "f" and kind not in PACKED:
        return plain.view(FLOAT[size])
    return plain.view(SIGNED[size]) if kind[0] == "s" else plain


def raw(numbers, kind: str):
    """The inverse of `typed`. Floats are rounded once, to nearest even."""
    numbers = np.asarray(numbers)
    size = size_of(kind)
    if kind == "bf16":
        return bfloat16_bits(numbers.astype(np.float32)).astype(RAW)
    if is_float(kind) and kind not in PACKED:
        with np.errstate(over="ignore"):
            return numbers.astype(FLOAT[size]).view(UNSIGNED[size]).astype(RAW)
    # Cast through the type's own width, which truncates as a register does.
    return numbers.astype(UNSIGNED[size]).astype(RAW)


def bfloat16_bits(x):
    """Bits of float32 rounded to bfloat16, to nearest even. PTX's canonical NaN is 0x7fff."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def halves(bits):
    """The two float32 halves of an f32x2."""
    low = bits.astype(np.uint32).view(np.float32)
    return low, (bits >> RAW(32)).astype(np.uint32).view(np.float32)


def join(low, high, bits: int = 32):
    """Raw bits of two raw halves, each `bits` wide."""
    return low | (high << RAW(bits))

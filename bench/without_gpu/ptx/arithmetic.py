"""Arithmetic instructions on typed lanes."""

import numpy as np

from .values import RAW, SIGNED, UNSIGNED, halves, is_float, join, raw, size_of, typed

F64 = np.float64


def fused(a, b, c):
    """a * b + c in float32, rounded once.

    The product of two float32 is exact in float64. The float64 sum is rounded to odd (the last bit
    is set if bits were lost). Then only the rounding to float32 counts.
    """
    product, addend = a.astype(F64) * b.astype(F64), c.astype(F64)
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    bits = total.view(np.uint64)
    inexact = np.isfinite(total) & (lost != 0) & (bits & RAW(1) == 0)
    towards_zero = (lost < 0) != (total < 0)
    step = np.where(towards_zero, RAW(0xFFFFFFFFFFFFFFFF), RAW(1))
    return np.where(inexact, bits + step, bits).view(F64).astype(np.float32)


def _quotient(a, b):
    """Integer division, towards zero. Division by 0 is not an error, as on a GPU."""
    safe = np.where(b == 0, 1, b)
    quotient = np.abs(a.astype(object)) // np.abs(safe.astype(object))
    negative = (a < 0) != (safe < 0)
    return np.where(negative, -quotient, quotient).astype(a.dtype)


def _shift(name, a, amount):
    width = 8 * a.dtype.itemsize
    small = np.minimum(amount, width - 1).astype(a.dtype)
    if name == "shl":
        return np.where(amount >= width, 0, a << small)
    fill = a >> a.dtype.type(width - 1) if a.dtype.kind == "i" else np.zeros_like(a)
    return np.where(amount >= width, fill, a >> small)


def _high_product(a, b):
    width = 8 * a.dtype.itemsize
    return ((a.astype(object) * b.astype(object)) >> width).astype(a.dtype)


def _table_of_three(a, b, c, table):
    """lop3: bit i of the table is the result for input bits (a, b, c) = i."""
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _permuted(a, b, selector):
    """prmt: each byte of the result is one of the eight bytes of b:a."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << RAW(32))
    result = np.zeros_like(both)
    for i in range(4):
        pick = (selector.astype(np.uint64) >> RAW(4 * i)) & RAW(7)
        result |= ((both >> (pick * RAW(8))) & RAW(255)) << RAW(8 * i)
    return result.astype(np.uint32)


def _funnel(name, low, high, amount, wraps):
    """shf: shifts the 64 bits high:low; a right shift returns the low half, a left the high."""
    amount = (amount & 31 if wraps else np.minimum(amount, 32)).astype(RAW)
    both = low.astype(RAW) | high.astype(RAW) << RAW(32)
    result = both >> amount if name == "r" else both << amount >> RAW(32)
    return result.astype(np.uint32)


def _least(a, b):
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


def _most(a, b):
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


UNARY = {
    "neg": lambda a: -a if a.dtype.kind != "u" else (~a) + a.dtype.type(1),
    "abs": np.abs,
    "not": np.invert,
    "popc": lambda a: np.array([int(x).bit_count() for x in a.tolist()], np.uint32),
    "ex2": lambda a: np.exp2(a.astype(F64)),
    "lg2": lambda a: np.log2(a.astype(F64)),
    "rcp": lambda a: 1.0 / a.astype(F64),
    "sqrt": lambda a: np.sqrt(a.astype(F64)),
    "rsqrt": lambda a: 1.0 / np.sqrt(a.astype(F64)),
}

BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": _least,
    "max": _most,
    "div": lambda a, b: a / b if a.dtype.kind == "f" else _quotient(a, b),
    "rem": lambda a, b: a - _quotient(a, b) * b,
}

#: Supported words beside the type in an opcode. Others (other roundings, saturation) are errors.
MODIFIERS = {"rn", "lo", "hi", "wide", "approx", "full", "ftz", "NaN", "l", "r", "wrap", "clamp"}
HANDLED = {*UNARY, *BINARY, "fma", "mad", "shl", "shr", "shf", "lop3", "prmt", "bfe"}


def is_mixed(instruction) -> bool:
    """`add.f32.bf16` and the like: narrow operands, but the last operand and result are fp32."""
    return instruction.kind in ("bf16", "f16") and instruction.modifiers[-2:-1] == ("f32",)


def operand_kinds(instruction) -> list[str]:
    """The type of each operand, without the result."""
    kinds = [instruction.kind] * (len(instruction.operands) - 1)
    if is_mixed(instruction):
        kinds[-1] = "f32"
    if "wide" in instruction.modifiers and len(kinds) == 3:
        kinds[2] = f"{instruction.kind[0]}{16 * size_of(instruction.kind)}"
    return kinds


def compute(instruction, operands):
    """Raw bits of an arithmetic result; `operands` are raw bits."""
    kind, name = instruction.kind, instruction.name
    mixed = is_mixed(instruction)
    if set(instruction.modifiers[: -2 if mixed else -1]) - MODIFIERS:
        raise NotImplementedError(instruction.text)
    with np.errstate(all="ignore"):
        if kind == "f32x2":
            parts = [halves(bits) for bits in operands]
            low, high = (_one(instruction, "f32", [p[i] for p in parts]) for i in (0, 1))
            return join(low, high)
        if "wide" in instruction.modifiers:
            return _wide(instruction, operands)
        if name == "shf":
            low, high, amount = (typed(o, "u32") for o in operands)
            right, clamps = instruction.modifiers[:2]
            return raw(_funnel(right, low, high, amount, clamps == "wrap"), kind)
        if name in ("shl", "shr"):
            return raw(_shift(name, typed(operands[0], kind), typed(operands[1], "u32")), kind)
        if name == "bfe":
            start, length = (typed(o, "u32").astype(np.uint64) & RAW(255) for o in operands[1:])
            return (typed(operands[0], "u64") >> start) & ((RAW(1) << length) - RAW(1))
        typed_operands = [
            typed(o, k) for o, k in zip(operands, operand_kinds(instruction), strict=True)
        ]
        if mixed:
            typed_operands, kind = [o.astype(np.float32) for o in typed_operands], "f32"
        return _one(instruction, kind, typed_operands)


def _flushed(x):
    """Flush subnormal float32 to zeros of the same sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _one(instruction, kind, a):
    name, modifiers = instruction.name, instruction.modifiers
    if flush := "ftz" in modifiers:
        a = [_flushed(x) for x in a]
    if name in ("fma", "mad") and is_float(kind):
        value = fused(*a) if kind == "f32" else a[0].astype(F64) * a[1] + a[2]
    elif name == "mad":
        product = _high_product(a[0], a[1]) if "hi" in modifiers else a[0] * a[1]
        value = product + a[2]
    elif name == "mul" and "hi" in modifiers:
        value = _high_product(a[0], a[1])
    elif name == "lop3":
        value = _table_of_three(*a[:3], int(a[3][0]))
    elif name == "prmt":
        value = _permuted(*a)
    elif name in UNARY:
        value = UNARY[name](a[0])
    elif name in ("min", "max") and "NaN" in modifiers:
        value = {"min": np.minimum, "max": np.maximum}[name](a[0], a[1])
        value = value if len(a) == 2 else {"min": np.minimum, "max": np.maximum}[name](value, a[2])
    elif name in ("min", "max") and len(a) == 3:
        value = BINARY[name](BINARY[name](a[0], a[1]), a[2])
    else:
        value = BINARY[name](*a)
    return raw(_flushed(np.asarray(value, np.float32)) if flush else value, kind)


def _wide(instruction, operands):
    """mul.wide and mad.wide: the result is twice as wide as the operands."""
    kind = instruction.kind
    double = size_of(kind) * 2
    wide = (SIGNED if kind[0] == "s" else UNSIGNED)[double]
    product = typed(operands[0], kind).astype(wide) * typed(operands[1], kind).astype(wide)
    if instruction.name == "mad":
        product = product + typed(operands[2], f"{kind[0]}{8 * double}")
    return raw(product, f"u{8 * double}")

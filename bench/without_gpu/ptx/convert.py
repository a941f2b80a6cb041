"""cvt, the comparisons of setp, and the packing of mov."""

import numpy as np

from .values import RAW, SIGNED, UNSIGNED, is_float, join, raw, size_of, typed

_ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def convert(instruction, operands):
    """Raw bits of a cvt's result; `operands` are raw bits."""
    to, source = instruction.modifiers[-2:]
    if "sat" in instruction.modifiers:
        raise NotImplementedError(instruction.text)
    with np.errstate(all="ignore"):
        if to in ("bf16x2", "f16x2"):
            high, low = (raw(typed(o, source), to[:-2]) for o in operands)
            return join(low, high, 16)
        value = typed(operands[0], source)
        if is_float(source) and not is_float(to):
            value = _to_integer(value, to, instruction.modifiers)
        return raw(value, to)


def _to_integer(value, to, modifiers):
    rounded = next((f for key, f in _ROUNDING.items() if key in modifiers), np.rint)(
        value.astype(np.float64)
    )
    info = np.iinfo((SIGNED if to[0] == "s" else UNSIGNED)[size_of(to)])
    limited = np.clip(np.nan_to_num(rounded), float(info.min), float(info.max))
    return limited.astype(info.dtype)


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compare(instruction, a, b, other=None):
    """A predicate per lane; `other` is the predicate operand of `.and`, `.or` and `.xor`."""
    name, kind = instruction.modifiers[0], instruction.kind
    a, b = typed(a, kind), typed(b, kind)
    if is_float(kind):
        unordered = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            result = unordered if name == "nan" else ~unordered
        elif name[-1] == "u" and name[:-1] in _COMPARE:  # unordered: true if an operand is NaN
            result = _COMPARE[name[:-1]](a, b) | unordered
        else:
            result = _COMPARE[name](a, b) & ~unordered
    else:
        result = _COMPARE[name](a, b)
    combine = next((m for m in instruction.modifiers[1:-1] if m in _COMBINE), None)
    return result if combine is None else _COMBINE[combine](result, other)


def unpack(bits, count: int, size: int):
    """Raw bits of `count` parts of `size` bytes each, lowest part first."""
    mask = RAW((1 << 8 * size) - 1)
    return [(bits >> RAW(8 * size * i)) & mask for i in range(count)]


def pack(parts, size: int):
    """The inverse of `unpack`."""
    mask = RAW((1 << 8 * size) - 1)
    total = np.zeros_like(parts[0])
    for i, part in enumerate(parts):
        total |= (part & mask) << RAW(8 * size * i)
    return total

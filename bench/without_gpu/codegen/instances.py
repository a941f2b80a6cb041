"""Decode the CUDA and HIP kernels and their template arguments from mangled names."""

import re
from dataclasses import dataclass
from pathlib import Path

from .record import ELEMENT_BYTES

FOLDER = Path(__file__).parents[3] / "csrc/gpu"

#: Template arguments of each kernel, in order.
TEMPLATES = {
    "row_stats": ("dtype", "statistics", "softcap", "shifted"),
    "row_grad": ("dtype", "softcap", "shifted", "entropy"),
    "row_stats_grad": ("dtype", "softcap", "shifted"),
    "row_rescale": ("dtype",),
    "fold_segments": ("statistics",),
    "merge": ("statistics",),
    "row_targets": (),
    "reduce": (),
}
NO_CAP, SMALL_CAP, LARGE_CAP = CAPS = range(3)  # enum Cap of csrc/gpu/row_math.cuh
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# _ZN 3fsl 3gpu 16row_stats_kernel I NS0_4BF16E Li3E Lb0E Lb0E E ...
_MANGLED = re.compile(r"_ZN3fsl3gpu\d+(\w+?)_kernel(?:I((?:NS0_\d+[A-Z0-9]+E|L[ib]\d+E)+)E)?E")
_ARGUMENT = re.compile(r"NS0_\d([A-Z0-9]+)E|L[ib](\d+)E")


@dataclass(frozen=True)
class Instance:
    """A kernel with its template arguments."""

    kernel: str
    dtype: str | None = None
    statistics: int | None = None  # number of statistics per row
    softcap: int = 0  # enum Cap: none, small, large
    shifted: bool = False
    entropy: bool = False

    @property
    def name(self) -> str:
        words = (
            self.kernel,
            self.dtype,
            self.statistics and f"x{self.statistics}",
            (None, "softcap", "softcap large")[self.softcap],
            self.entropy and "entropy",
            self.shifted and "shifted",
        )
        return " ".join(filter(None, words))

    @property
    def element_bytes(self) -> int | None:
        return ELEMENT_BYTES.get(self.dtype)

    @property
    def plain(self) -> bool:
        """Whether plain training, with no options and aligned rows, launches it."""
        return self.statistics in (None, 3) and not (self.softcap or self.shifted or self.entropy)


def instance(mangled: str) -> Instance:
    """Decode the mangled name of a kernel."""
    found = _MANGLED.match(mangled)
    if not found or found[1] not in TEMPLATES:
        raise ValueError(f"expected a kernel that TEMPLATES of {__file__} names, got {mangled}")
    arguments = [DTYPES.get(a) or int(b) for a, b in _ARGUMENT.findall(found[2] or "")]
    named = dict(zip(TEMPLATES[found[1]], arguments, strict=True))
    flags = {name: bool(named[name]) for name in ("shifted", "entropy") if name in named}
    return Instance(found[1], **{**named, **flags})

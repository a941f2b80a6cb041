"""The launch table of the kernels: a shape for each chip, use and width, with its reason."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .arithmetic import INTERPRETED

#: Programs per multiprocessor that `splits` aims for. It is about three times the number of
#: resident programs: if only one row in three is scored, every multiprocessor still has a full
#: load.
PROGRAMS = 32

#: Rows per program of the kernels over vectors of N rows: one row per thread.
VECTOR_BLOCK = 256

#: What the launch table distinguishes: the row kernels, and options that need more registers.
STATS = ("row_stats", "row_stats softcap", "row_stats large softcap", "row_stats metrics")
GRAD = ("row_grad",)
SPILLING = ("row_stats large softcap", "row_stats metrics")
USES = STATS + GRAD


@dataclass(frozen=True)
class Chip:
    """The properties of a device that the launch table uses."""

    name: str  # "sm_90", "gfx942"
    warp: int  # threads per warp or wave
    multiprocessors: int

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def capability(self) -> int:
        """NVIDIA's compute capability, 90 for 9.0; 0 for other vendors."""
        return int(self.name.removeprefix("sm_")) if self.name.startswith("sm_") else 0


@dataclass(frozen=True)
class Shape:
    """A line of the table: the launch shape of a kernel on some chips, for some row widths.

    It counts threads, not warps: the 32 warps that fill an NVIDIA block would be 2048 threads on
    AMD, more than a block can have. It serves all dtypes of logits, because otherwise the last bits
    of a bf16 loss could differ from those of an fp32 loss of the same numbers.
    """

    chips: str  # how their names begin: "sm_", "gfx", or a whole name
    uses: tuple[str, ...]  # among USES
    columns: int | None  # for V_local up to this; None: any
    threads: int
    runs: int  # runs of 8 neighbouring columns that a thread loads at once
    segment: int  # columns; programs share a row in whole segments
    why: str
    capability: int = 0  # NVIDIA: the lowest compute capability of the line, 90 for 9.0

    def __post_init__(self):
        powers = all(n & (n - 1) == 0 for n in (self.threads, self.runs, self.segment))
        if not (64 <= self.threads <= 1024 and powers and self.segment % self.tile == 0):
            raise ValueError(
                "expected 64 to 1024 threads and a segment of whole tiles, all powers of two, got "
                f"{self.threads} threads, tiles of {self.tile} and a segment of {self.segment}"
            )

    @property
    def tile(self) -> int:
        """Columns that a program loads at once."""
        return self.runs * self.threads * 8

    def is_for(self, chip: Chip) -> bool:
        newer = not self.capability or chip.capability >= self.capability
        return newer and chip.name.startswith(self.chips)

    def options(self, chip: Chip) -> dict[str, Any]:
        return options(chip, self.threads)


@dataclass(frozen=True)
class Launch:
    """A complete kernel launch; it can be run, or read by an offline compile."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def options(chip: Chip, threads: int) -> dict[str, Any]:
    """Triton's launch options.

    With one stage, loads go to registers, not through shared memory. Without contraction, a formula
    gives the same bits in every kernel; the kernels write out their FMAs.
    """
    common = {"num_warps": threads // chip.warp, "num_stages": 1, "enable_fp_fusion": False}
    if not chip.amd:
        return common
    # waves_per_eu 0 sets no occupancy for the register allocator. With denormals flushed, exp2 is
    # the bare instruction; keeping results below 2^-126 would take three more.
    return {**common, "waves_per_eu": 0, "allow_flush_denorm": True}


def vector_options(chip: Chip) -> dict[str, Any]:
    """Launch options of the kernels over vectors of N rows."""
    return options(chip, VECTOR_BLOCK)


def targets_options(chip: Chip) -> dict[str, Any]:
    """Launch options of kernels in which one program reads all rows.

    They have many threads, because the program is bound by loads in flight.
    """
    return options(chip, 512)


@cache
def chip_of(device: torch.device) -> Chip:
    """The chip of a device. Reads properties that torch caches; does not synchronise.

    Raises:
        ValueError: CPU tensors without the interpreter, or a device Triton has no backend for.
    """
    if INTERPRETED.value:
        return INTERPRETER
    if device.type != "cuda":
        raise ValueError(
            f"expected tensors on an NVIDIA or AMD GPU, got {device}; on a CPU these kernels run "
            "only in Triton's interpreter (TRITON_INTERPRET=1 before the first import of triton)"
        )
    properties = torch.cuda.get_device_properties(device)
    name = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        name = properties.gcnArchName.partition(":")[0]
    return Chip(name, properties.warp_size, properties.multi_processor_count)


def lines(chip: Chip) -> list[Shape]:
    """The table's lines for a chip."""
    return [shape for shape in SHAPES if shape.is_for(chip)]


def shape_for(chip: Chip, use: str, columns: int) -> Shape:
    """The first line that matches a chip, a use and a number of columns."""
    return next(
        shape
        for shape in SHAPES
        if (shape.columns is None or columns <= shape.columns)
        and use in shape.uses
        and shape.is_for(chip)
    )


def splits(chip: Chip, rows: int, segments: int) -> int:
    """Programs per row, so that few rows fill the chip too.

    The number of scored rows is unknown without a synchronisation, so PROGRAMS allows for masked
    rows. In row_stats each program of a masked row exits at once.
    """
    wanted = chip.multiprocessors * PROGRAMS
    return max(1, min(segments, -(-wanted // max(rows, 1))))


def aligned(tensor: torch.Tensor) -> bool:
    """Whether every row of `[b, s, v]` starts at a multiple of 16 bytes."""
    if tensor.data_ptr() % 16:
        return False
    pairs = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return all(size == 1 or stride * tensor.element_size() % 16 == 0 for size, stride in pairs)


INTERPRETER = Chip("interpreter", 1, 1)

# The first line that matches is used; a chip newer than the table takes the lines of its vendor.
# The lines were chosen by registers, spills and bytes in flight of the compiled code (Triton 3.9,
# ptxas 13); bench/without_gpu/codegen/budgets.py lists them, and tests compile the kernels and
# compare. Measured chip: one H100, with 94 to 97 % of a copy at 131072 columns in bf16 and fp32, 72
# to 95 at fewer. On AMD, four waves were measured best for a cross-entropy on MI308X (ROCm/aiter).
SHAPES: tuple[Shape, ...] = (
    Shape("sm_", USES, 2048, 128, 1, 2048, "two tiles at most, few columns idle"),
    Shape("sm_", ("row_stats",), None, 128, 4, 16384, "7 % fewer instructions", capability=100),
    Shape("sm_", SPILLING, None, 128, 1, 16384, "2 runs spill", capability=100),
    Shape("sm_", USES, None, 128, 2, 16384, "enough in flight; 4 runs cost occupancy"),
    Shape("gfx", USES, 2048, 256, 1, 2048, "a tile at most"),
    Shape("gfx", USES, None, 256, 2, 32768, "all 8 waves; with 4 runs row_grad gets 5"),
    Shape(INTERPRETER.name, USES, 2048, 64, 2, 1024, "small tiles for small rows, and segments"),
    Shape(INTERPRETER.name, STATS, 65536, 512, 2, 16384, "numpy's cost is per call; two tiles"),
    Shape(INTERPRETER.name, STATS, None, 1024, 4, 65536, "numpy's cost is per call"),
    Shape(INTERPRETER.name, GRAD, 65536, 512, 4, 16384, "numpy's cost is per call"),
    Shape(INTERPRETER.name, GRAD, None, 1024, 8, 65536, "numpy's cost is per call"),
)

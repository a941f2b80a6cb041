"""How the kernels are launched: the chips, and a table of shapes with the reason beside each."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .arithmetic import INTERPRETED

#: Programs per multiprocessor that `splits` asks for, about three times what is resident: with one
#: row in three scored every multiprocessor still has its full load.
PROGRAMS = 32

#: Rows per program of the kernels over vectors of N rows: a row a thread.
VECTOR_BLOCK = 256

#: What the launch table tells apart: the row kernels, and options that take more registers.
STATS = ("row_stats", "row_stats softcap", "row_stats metrics")
GRAD = ("row_grad",)
USES = STATS + GRAD


@dataclass(frozen=True)
class Chip:
    """What launch policy knows of a device."""

    name: str  # "sm_90", "gfx942"
    warp: int  # threads that run in step
    multiprocessors: int

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def capability(self) -> int:
        """NVIDIA's compute capability, 90 for 9.0; 0 for others."""
        return int(self.name.removeprefix("sm_")) if self.name.startswith("sm_") else 0


@dataclass(frozen=True)
class Shape:
    """A line of the table: how the programs of a kernel look on some chips, for some rows.

    Threads, not warps: the 32 warps that fill an NVIDIA block would be 2048 threads on AMD, which
    no launch can have, and which this class cannot express. All dtypes of logits alike: otherwise a
    bf16 loss would differ in its last bits from that of the same numbers in fp32.
    """

    chips: str  # what their names begin with: "sm_", "gfx", or a whole name
    uses: tuple[str, ...]  # among USES
    columns: int | None  # for V_local up to this; None: any
    threads: int
    runs: int  # of 8 neighbouring columns, that a thread takes in at once
    segment: int  # columns; the unit in which a row is shared out
    why: str
    capability: int = 0  # NVIDIA: compute capability, 90 for 9.0, from which on the line serves

    def __post_init__(self):
        powers = all(n & (n - 1) == 0 for n in (self.threads, self.runs, self.segment))
        if not (64 <= self.threads <= 1024 and powers and self.segment % self.tile == 0):
            raise ValueError(
                "expected 64 to 1024 threads and a segment of whole tiles, all powers of two, got "
                f"{self.threads} threads, tiles of {self.tile} and a segment of {self.segment}"
            )

    @property
    def tile(self) -> int:
        """Columns that a program takes in at once."""
        return self.runs * self.threads * 8

    def is_for(self, chip: Chip) -> bool:
        newer = not self.capability or chip.capability >= self.capability
        return newer and chip.name.startswith(self.chips)

    def options(self, chip: Chip) -> dict[str, Any]:
        return options(chip, self.threads)


@dataclass(frozen=True)
class Launch:
    """One kernel launch, complete: what is run, and what an offline compile reads."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def options(chip: Chip, threads: int) -> dict[str, Any]:
    """Triton's launch options.

    One stage: loads go to registers, not through shared memory. No contraction: a formula has the
    same bits in every kernel, and FMAs are written out.
    """
    common = {"num_warps": threads // chip.warp, "num_stages": 1, "enable_fp_fusion": False}
    if not chip.amd:
        return common
    # No occupancy asked of the register allocator. Denormals flushed: exp2 is then the bare
    # instruction, without three more to rescue results under 2^-126.
    return {**common, "waves_per_eu": 0, "allow_flush_denorm": True}


def vector_options(chip: Chip) -> dict[str, Any]:
    """For the kernels over vectors of N rows."""
    return options(chip, VECTOR_BLOCK)


def targets_options(chip: Chip) -> dict[str, Any]:
    """Many threads: one program reads all rows, and what bounds it is loads in flight."""
    return options(chip, 512)


@cache
def chip_of(device: torch.device) -> Chip:
    """The chip behind a device; reads properties that torch has cached, synchronises nothing.

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
    """The lines of the table for a chip."""
    return [shape for shape in SHAPES if shape.is_for(chip)]


def shape_for(chip: Chip, use: str, columns: int) -> Shape:
    """The first line for a chip that serves `use` at `columns` logits."""
    return next(
        shape
        for shape in SHAPES
        if (shape.columns is None or columns <= shape.columns)
        and use in shape.uses
        and shape.is_for(chip)
    )


def splits(chip: Chip, rows: int, segments: int) -> int:
    """Programs per row, so that even few rows fill the chip.

    How many rows are scored is not known without a synchronisation, hence PROGRAMS; the programs
    of a masked row cost an exit each.
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

# The first line that serves is taken; a chip newer than the table takes the lines of its vendor.
# The choices rest on registers, spills and bytes in flight of compiled code (Triton 3.9, ptxas 13):
# bench/without_gpu/codegen/budgets.py lists them, and tests compile the kernels and compare. Of all
# chips an H100 alone was timed: 94 to 97 % of a copy at 131072 columns in bf16 and fp32, 72 to 95
# at fewer. On AMD four waves were measured best for a cross-entropy on MI308X (ROCm/aiter).
SHAPES: tuple[Shape, ...] = (
    Shape("sm_", USES, 2048, 128, 1, 2048, "two tiles at most, few columns idle"),
    Shape("sm_", ("row_stats",), None, 128, 4, 16384, "7 % fewer instructions", capability=100),
    Shape("sm_", ("row_stats metrics",), None, 128, 1, 16384, "2 runs spill", capability=100),
    Shape("sm_", USES, None, 128, 2, 16384, "enough in flight; 4 runs cost occupancy"),
    Shape("gfx", USES, 2048, 256, 1, 2048, "a tile at most"),
    Shape("gfx", USES, None, 256, 2, 32768, "all 8 waves; with 4 runs row_grad gets 5"),
    Shape(INTERPRETER.name, USES, 2048, 64, 2, 1024, "small tiles for small rows, and segments"),
    Shape(INTERPRETER.name, STATS, 65536, 512, 2, 16384, "numpy's cost is per call; two tiles"),
    Shape(INTERPRETER.name, STATS, None, 1024, 4, 65536, "numpy's cost is per call"),
    Shape(INTERPRETER.name, GRAD, 65536, 512, 4, 16384, "numpy's cost is per call"),
    Shape(INTERPRETER.name, GRAD, None, 1024, 8, 65536, "numpy's cost is per call"),
)

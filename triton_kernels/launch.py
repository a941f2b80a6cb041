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

ANY = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Chip:
    """What launch policy knows of a device."""

    name: str  # "sm_90", "gfx942"
    warp: int  # threads that run in step
    multiprocessors: int

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")


@dataclass(frozen=True)
class Shape:
    """A line of the table: how the programs of one kernel look for some rows.

    Threads, not warps: the 32 warps that fill an NVIDIA block would be 2048 threads on AMD, which
    no launch can have, and which this class cannot express.
    """

    kernel: str  # "row_stats", "row_stats metrics", "row_stats softcap" or "row_grad"
    dtypes: tuple[torch.dtype, ...]  # of the logits
    columns: int | None  # for V_local up to this; None: any
    threads: int
    runs: int  # of 8 neighbouring columns, that a thread takes in at once
    segment: int  # columns; the unit in which a row is shared out
    why: str
    waves_per_eu: int = 0  # AMD: occupancy the register allocator must reach; 0: its own choice

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

    def options(self, chip: Chip) -> dict[str, Any]:
        return options(chip, self.threads, self.waves_per_eu)


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


def options(chip: Chip, threads: int, waves_per_eu: int = 0) -> dict[str, Any]:
    """Triton's launch options.

    One stage: loads go to registers, not through shared memory. No contraction: a formula has the
    same bits in every kernel, and FMAs are written out.
    """
    common = {"num_warps": threads // chip.warp, "num_stages": 1, "enable_fp_fusion": False}
    if not chip.amd:
        return common
    # Denormals flushed: exp2 is then the bare instruction, without three more to rescue results
    # under 2^-126.
    return {**common, "waves_per_eu": waves_per_eu, "allow_flush_denorm": True}


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


def generation(chip: Chip) -> str:
    """The key of SHAPES that serves a chip: its own, or that of the nearest older one."""
    if chip.name in SHAPES:
        return chip.name
    if chip.amd:
        known = ("gfx950", "gfx942") if chip.warp == 64 else ()
        return next((name for name in known if chip.name >= name), "gfx90a")
    number = int(chip.name.removeprefix("sm_"))
    return "sm_100" if number >= 100 else "sm_90" if number >= 90 else "sm_80"


def shape_for(chip: Chip, kernel: str, dtype: torch.dtype, columns: int) -> Shape:
    """The first line that serves `kernel`, as a whole or by its first word, at `columns` logits."""
    return next(
        shape
        for shape in SHAPES[generation(chip)]
        if kernel.startswith(shape.kernel)
        and dtype in shape.dtypes
        and (shape.columns is None or columns <= shape.columns)
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

# Registers are those of the plain kernels as compiled (Triton 3.9, ptxas 13): bf16, and fp32 where
# it differs. "In flight" is what the resident threads of a multiprocessor load at once; bandwidth
# times 800 ns asks for 15 KiB (A100), 20 (H100), 42 (B200), 12 (MI250X die), 14 (MI300X), 24
# (MI355X). Timed were those of sm_90 alone, on an H100: 94 to 97 % of a copy at 131072 columns in
# bf16 and fp32, 72 to 95 at fewer. row_stats takes all dtypes alike, or a bf16 loss would differ in
# its last bits from that of the same numbers in fp32.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "sm_80": (
        Shape("row_stats", ANY, 2048, 128, 1, 2048, "two tiles at most, few columns idle"),
        Shape("row_stats", ANY, None, 128, 2, 16384, "37 (39) registers, 48 KiB; 4 runs take 60"),
        Shape("row_grad", ANY, 2048, 128, 1, 2048, "two tiles at most, few columns idle"),
        Shape("row_grad", ANY, None, 128, 2, 16384, "40 (52) registers, 48 KiB; 4 runs take 70"),
    ),
    "sm_90": (
        Shape("row_stats", ANY, 2048, 128, 1, 2048, "two tiles at most, few columns idle"),
        Shape("row_stats", ANY, None, 128, 2, 16384, "48 (45) registers, 40 KiB in flight"),
        Shape("row_grad", ANY, 2048, 128, 1, 2048, "two tiles at most, few columns idle"),
        Shape("row_grad", ANY, None, 128, 2, 16384, "40 (56) registers, 48 KiB; 4 runs take 71"),
    ),
    "sm_100": (
        Shape("row_stats", ANY, 2048, 128, 1, 2048, "two tiles at most, few columns idle"),
        Shape("row_stats metrics", ANY, None, 128, 1, 16384, "50 (40) registers; 2 runs spill"),
        Shape("row_stats softcap", ANY, None, 128, 2, 16384, "50 (77) registers; 4 runs take 85"),
        Shape("row_stats", ANY, None, 128, 4, 16384, "53 registers, 72 KiB, 7% fewer instr."),
        Shape("row_grad", ANY, 2048, 128, 1, 2048, "two tiles at most, few columns idle"),
        Shape("row_grad", ANY, None, 128, 2, 16384, "40 (56) registers, 48 KiB; 4 runs take 79"),
    ),
    "gfx90a": (
        Shape("row_stats", ANY, 2048, 256, 1, 2048, "a tile at most"),
        Shape("row_stats", ANY, None, 256, 2, 32768, "41 (43) registers: all 8 waves, 64 KiB"),
        Shape("row_grad", ANY, 2048, 256, 1, 2048, "a tile at most"),
        Shape("row_grad", ANY, None, 256, 2, 32768, "61 (62) registers: all 8 waves; 4 runs get 5"),
    ),
    # Four waves were measured best for a cross-entropy on MI308X (ROCm/aiter).
    "gfx942": (
        Shape("row_stats", ANY, 2048, 256, 1, 2048, "a tile at most"),
        Shape("row_stats", ANY, None, 256, 2, 32768, "44 (51) registers: all 8 waves, 64 KiB"),
        Shape("row_grad", ANY, 2048, 256, 1, 2048, "a tile at most"),
        Shape("row_grad", ANY, None, 256, 2, 32768, "63 (61) registers: all 8 waves; 4 runs get 5"),
    ),
    "gfx950": (
        Shape("row_stats", ANY, 2048, 256, 1, 2048, "a tile at most"),
        Shape("row_stats", ANY, None, 256, 2, 32768, "44 (51) registers: all 8 waves, 64 KiB"),
        Shape("row_grad", ANY, 2048, 256, 1, 2048, "a tile at most"),
        Shape("row_grad", ANY, None, 256, 2, 32768, "60 (61) registers: all 8 waves; 4 runs get 5"),
    ),
    INTERPRETER.name: (
        Shape("row_stats", ANY, 2048, 64, 2, 1024, "small tiles for small rows, and segments"),
        Shape("row_stats", ANY, 65536, 512, 2, 16384, "numpy's cost is per call; two tiles"),
        Shape("row_stats", ANY, None, 1024, 4, 65536, "as above"),
        Shape("row_grad", ANY, 2048, 64, 2, 1024, "as row_stats"),
        Shape("row_grad", ANY, 65536, 512, 4, 16384, "as row_stats"),
        Shape("row_grad", ANY, None, 1024, 8, 65536, "as row_stats"),
    ),
}

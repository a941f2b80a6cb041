"""Chooses a call's line of the launch table, or with FUSED_SFT_LOSS_AUTOTUNE=1 searches for one."""

from collections.abc import Callable, Iterator
from itertools import product

import torch

from ..flags import enabled
from .launch import Chip, Shape, shape_for

VARIABLE = "FUSED_SFT_LOSS_AUTOTUNE"

_found: dict[tuple, Shape] = {}


def choose(chip: Chip, kernel: str, logits: torch.Tensor, launch: Callable[[Shape], None]) -> Shape:
    """The shape to launch `kernel` with on logits `[b, s, v]`.

    A search times `launch` with each candidate, once per chip, kernel, dtype and V_local. It
    synchronises. Another run may find another shape, which gives other last bits. To keep a result,
    put the line that the search prints at the head of SHAPES and unset the variable.
    """
    if not enabled(VARIABLE):
        return shape_for(chip, kernel, logits.shape[-1])
    key = (chip, kernel, logits.dtype, logits.shape[-1])
    if key not in _found:
        _found[key] = search(*key, launch)
    return _found[key]


def search(
    chip: Chip,
    kernel: str,
    dtype: torch.dtype,
    columns: int,
    launch: Callable[[Shape], None],
    timer: Callable[[Callable[[], None]], float] | None = None,
    report: Callable[[str], None] = print,
) -> Shape:
    """The fastest candidate by `timer`, which returns milliseconds (default: Triton's do_bench)."""
    if timer is None:
        from triton.testing import do_bench as timer
    times = {}
    for shape in candidates(chip, kernel, columns):
        times[shape] = timer(lambda shape=shape: launch(shape))
    best = min(times, key=times.get)
    table = shape_for(chip, kernel, columns)
    report(
        f"{VARIABLE}: {chip.name} {kernel}, {columns} columns of {dtype}: {times[best]:.4f} ms, "
        f"the table's line {times[table]:.4f} ms. At the head of SHAPES, for all dtypes:\n"
        f"    Shape({chip.name!r}, ({kernel!r},), {columns}, {best.threads}, {best.runs}, "
        f'{best.segment}, "{times[best]:.4f} ms measured"),'
    )
    return best


def candidates(chip: Chip, kernel: str, columns: int) -> Iterator[Shape]:
    """The table's line, then other threads and runs whose tile fits into the line's segment."""
    table = shape_for(chip, kernel, columns)
    yield table
    for threads, runs in product((64, 128, 256, 512, 1024), (1, 2, 4, 8)):
        if threads * runs * 8 <= table.segment:
            yield Shape(chip.name, (kernel,), columns, threads, runs, table.segment, "searched")

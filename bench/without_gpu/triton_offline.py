"""List every launch that the launch tables can make, and compile it without the chip.

The kernels' own `plan` functions make the launches, from tensors without memory ("meta"). Triton's
own launcher code specialises the arguments. So the compiled kernels are the launched ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import triton
from fused_sft_loss.triton_kernels import merge, reduce, row_grad, row_stats, row_targets
from fused_sft_loss.triton_kernels.launch import (
    Chip,
    Launch,
    Shape,
    lines,
    shape_for,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fused_sft_loss.backends.contract import METRICS, EntropyGrad, RowFactor, normalizer_like
from fused_sft_loss.rowmath import RowMath
from fused_sft_loss.scoring import Scoring
from fused_sft_loss.targets import Targets

from .chips import CHIPS as LIMITS
from .chips import TRITON

CHIPS = {name: Chip(name, LIMITS[name].warp, LIMITS[name].units) for name in TRITON}

#: Dtypes of the logits.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: V_local for a line of the table without a limit: an unsharded vocabulary of 128k.
WIDEST = 128256

#: One softcap for each value of SOFTCAP in the kernels, and its part of a variant's name.
CAPS = {0.0: "", 30.0: " softcap", 50.0: " softcap large"}


@dataclass(frozen=True)
class Variant:
    """One launch, with the options that led to it."""

    chip: Chip
    shape: Shape | None  # None: a kernel over vectors of N rows
    use: str | None  # of the shape, in the launch table
    name: str  # kernel, dtype and options
    launch: Launch


def variants(chip: Chip, options: bool = True) -> Iterator[Variant]:
    """Every launch of a chip's lines. Without `options` only the launches of plain training; with
    it also softcap, smoothing, metrics, unaligned rows and masks."""
    for shape, make, dtype in product(lines(chip), (_stats, _grad), DTYPES):
        yield from make(chip, shape, dtype, options)
    yield from _merge(chip, options)
    yield from _reduce(chip)
    yield from _targets(chip, options)


def target(chip: Chip) -> GPUTarget:
    """A chip as Triton's compilation target."""
    if chip.amd:
        return GPUTarget("hip", chip.name, chip.warp)
    return GPUTarget("cuda", int(chip.name.removeprefix("sm_")), chip.warp)


def compile(launch: Launch, chip: Chip):
    """Triton's CompiledKernel (`.asm`, `.metadata`) of a launch; needs no GPU."""
    kernel, backend = launch.kernel, make_backend(target(chip))
    if not isinstance(kernel, triton.JITFunction):
        raise ValueError(
            "expected kernels to compile, got interpreted ones; unset TRITON_INTERPRET before the "
            "first import of triton"
        )
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = {**launch.arguments, **launch.options}
    bound, specialization, rest = binder(**given)
    options, signature, constants, attributes = kernel._pack_args(
        backend, {**given, "debug": False}, bound, specialization, rest
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target(chip), options=options.__dict__)


def _logits(dtype, columns, rows, unaligned):
    stride = columns + 1 if unaligned else columns
    return torch.empty_strided((1, rows, columns), (0, stride, 1), dtype=dtype, device="meta")


def _vectors(rows, *dtypes):
    return [torch.empty(rows, dtype=dtype, device="meta") for dtype in dtypes]


def _normalizer(rows):
    return normalizer_like(*_vectors(rows, torch.float32))


def _number():
    return torch.empty((), dtype=torch.float32, device="meta")


def _stats(chip, shape, dtype, options) -> Iterator[Variant]:
    few, many = 64, 64 * chip.multiprocessors  # few rows are split over programs, many are not
    uses = [(wanted, cap, False) for wanted in (3, 4, 6) for cap in CAPS]
    uses.append((METRICS, 0.0, True))
    flags = product(uses if options else uses[:1], (False, True)[: 1 + options], (many, few))
    columns = shape.columns or WIDEST
    for (wanted, softcap, scaled), unaligned, rows in flags:
        use = row_stats.table_name(wanted, softcap)
        if shape_for(chip, use, columns) != shape:
            continue
        plan = row_stats.plan(
            chip,
            shape,
            RowMath(0, columns, softcap=softcap),
            _logits(dtype, columns, rows, unaligned),
            *_vectors(rows, torch.int64, torch.float32),
            torch.empty(rows, wanted, dtype=torch.float32, device="meta"),
            *_vectors(rows, *[torch.float32] * scaled),
        )
        name = f"{dtype} x{wanted}{CAPS[softcap]}{' scaled' * scaled}"
        name += " unaligned" * unaligned
        split = " split" * (len(plan) > 1)
        yield Variant(chip, shape, use, f"row_stats {name}{split}", plan[0])
        for launch in plan[1:]:
            yield Variant(chip, None, None, f"fold_segments x{wanted}{' scaled' * scaled}", launch)


def _grad(chip, shape, dtype, options) -> Iterator[Variant]:
    columns = shape.columns or WIDEST
    if shape_for(chip, "row_grad", columns) != shape:
        return
    few, many = 64, 64 * chip.multiprocessors  # many: over 2 GiB of fp32 logits
    uses = [*((cap, False) for cap in CAPS), (0.0, True)] if options else [(0.0, False)]
    flags = product(uses, (False, True)[: 1 + options], (many, few))
    for (softcap, entropy), unaligned, rows in flags:
        logits = _logits(dtype, columns, rows, unaligned)
        of_tokens = _vectors(rows, *[torch.float32] * 3) if entropy else None
        (launch,) = row_grad.plan(
            chip,
            shape,
            RowMath(0, columns, softcap=softcap),
            logits,
            _normalizer(rows),
            *_vectors(rows, torch.int64),
            RowFactor(_number(), *_vectors(rows, torch.float32), _number()),
            logits,
            *((of_tokens[0], EntropyGrad(*of_tokens[1:])) if of_tokens else ()),
        )
        name = f"row_grad {dtype}{CAPS[softcap]}{' entropy' * entropy}"
        name += " unaligned" * unaligned
        yield Variant(chip, shape, "row_grad", name + " few rows" * (rows == few), launch)


def _merge(chip, options) -> Iterator[Variant]:
    rows = 4096
    uses = ((3, False), (4, False), (6, True), (6, True, True)) if options else ((3, False),)
    for columns, metrics, *scaled in uses:
        extra = (torch.float32, torch.float32, torch.bool, torch.float32) if metrics else ()
        numbers = {"label_smoothing": 0.1, "z_loss": 1e-4} if columns > 3 else {}
        (launch,) = merge.plan(
            chip,
            RowMath(0, WIDEST, **numbers),
            torch.empty(8, rows, columns, dtype=torch.float32, device="meta"),
            *_vectors(rows, torch.int64, torch.float32, torch.float32),
            _normalizer(rows),
            *_vectors(rows, *extra),
            scale=_vectors(rows, torch.float32)[0] if scaled else None,
        )
        yield Variant(chip, None, None, f"merge x{columns}{' scaled' * bool(scaled)}", launch)


def _reduce(chip) -> Iterator[Variant]:
    (losses,) = _vectors(4096, torch.float32)
    for weight_sum in (None, _number()):
        (launch,) = reduce.plan(chip, losses, weight_sum, _number())
        name = "reduce to a sum" if weight_sum is None else "reduce to a mean"
        yield Variant(chip, None, None, name, launch)


def _targets(chip, options) -> Iterator[Variant]:
    masks = (None, torch.bool, torch.int64, torch.float32, torch.bfloat16)
    for mask, documents in product(masks, (0, 17)) if options else [(None, 0)]:
        labels = torch.empty(2, 4096, dtype=torch.int64, device="meta")
        loss_mask = None if mask is None else labels.to(mask)
        bounds = torch.empty(documents, dtype=torch.int32, device="meta") if documents else None
        scoring = Scoring(labels, loss_mask, bounds, shift=True, ignore_index=-100)
        (launch,) = row_targets.plan(chip, scoring, WIDEST, Targets.empty(labels))
        name = f"row_targets mask {mask}{' documents' * bool(documents)}"
        yield Variant(chip, None, None, name, launch)

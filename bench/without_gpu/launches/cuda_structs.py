"""The argument structs of the C++ kernels, as csrc/args.h and the device files declare them."""

from ctypes import (
    Structure,
    c_bool,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
)

from fused_sft_loss import rowmath

POINTER = c_uint64
F32, BF16, F16 = 0, 1, 2


def _struct(name: str, **fields):
    return type(name, (Structure,), {"_fields_": list(fields.items())})


def _of(kind, names: str) -> dict:
    return dict.fromkeys(names.split(), kind)


Divisor = _struct("Divisor", **_of(c_uint32, "value multiplier shift"))
Rows = _struct(
    "Rows",
    data=POINTER,
    dtype=c_int,
    **_of(c_int64, "batch seq columns valid stride_b stride_s"),
    by_seq=Divisor,
)
RowMath = _struct(
    "RowMath",
    **{
        name: c_int64 if kind is int else c_float
        for name, kind in rowmath.RowMath.__annotations__.items()
    },
)
StatsArgs = _struct(
    "StatsArgs",
    logits=Rows,
    math=RowMath,
    **_of(POINTER, "target weight"),
    want=c_int,
    **_of(POINTER, "stats scale"),
)
RowFactor = _struct("RowFactor", grad=POINTER, stride=c_int64, **_of(POINTER, "weight weight_sum"))
EntropyGrad = _struct("EntropyGrad", grad=POINTER, stride=c_int64, entropy=POINTER)
GradArgs = _struct(
    "GradArgs",
    **_of(Rows, "logits grad"),
    math=RowMath,
    **_of(POINTER, "target normalizer"),
    factor=RowFactor,
    **_of(POINTER, "stored scale"),
    entropy=EntropyGrad,
)
StatsGradArgs = _struct("StatsGradArgs", grad=GradArgs, **_of(POINTER, "weight loss normalizer"))
RescaleArgs = _struct("RescaleArgs", grad=Rows, factor=RowFactor, stored=POINTER)
TargetsArgs = _struct(
    "TargetsArgs",
    **_of(POINTER, "labels mask cu_seqlens"),
    **_of(c_int64, "batch seq boundaries"),
    **_of(c_int64, "label_stride_b label_stride_s mask_stride_b mask_stride_s"),
    shift=c_bool,
    **_of(c_int64, "ignore_index vocab_size"),
    **_of(POINTER, "target weight count weight_sum"),
)
MergeArgs = _struct(
    "MergeArgs",
    stats=POINTER,
    **_of(c_int64, "ranks rows statistics rank_stride"),
    **_of(POINTER, "target weight"),
    math=RowMath,
    **_of(POINTER, "loss normalizer scale"),
)
ReduceArgs = _struct("ReduceArgs", loss=POINTER, rows=c_int64, **_of(POINTER, "weight_sum result"))
Metrics = _struct("Metrics", **_of(POINTER, "lse log_prob correct entropy"))
Units = _struct("Units", **_of(c_float, "unit unit_log2 far inward cap logit_scale"))
RowSplit = _struct(
    "RowSplit", blocks=Divisor, **_of(c_int32, "segment segments each"), parts=POINTER
)
Holding = _struct("Holding", cluster=Divisor, **_of(c_int32, "each columns"), clusters=c_uint32)

#: The structs by their C++ names.
STRUCTS = {
    **{f"fsl::{s.__name__}": s for s in (Divisor, Rows, RowMath, RowFactor, StatsArgs)},
    **{f"fsl::{s.__name__}": s for s in (EntropyGrad, GradArgs, StatsGradArgs, RescaleArgs)},
    **{f"fsl::{s.__name__}": s for s in (TargetsArgs, MergeArgs, ReduceArgs)},
    **{f"fsl::gpu::{s.__name__}": s for s in (Metrics, Units, RowSplit, Holding)},
}

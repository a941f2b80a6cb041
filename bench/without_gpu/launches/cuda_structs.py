"""The structs that the C++ kernels take, as csrc/args.h and the device files declare them."""

from ctypes import (
    Structure,
    c_bool,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_uint64,
)

POINTER = c_uint64
F32, BF16, F16 = 0, 1, 2


def _struct(name: str, **fields):
    return type(name, (Structure,), {"_fields_": list(fields.items())})


def _of(kind, names: str) -> dict:
    return dict.fromkeys(names.split(), kind)


Rows = _struct(
    "Rows",
    data=POINTER,
    dtype=c_int,
    **_of(c_int64, "batch seq columns valid stride_b stride_s"),
)
Transform = _struct("Transform", **_of(c_float, "logit_scale softcap"))
StatsArgs = _struct(
    "StatsArgs",
    logits=Rows,
    transform=Transform,
    **_of(POINTER, "target weight"),
    vocab_start=c_int64,
    want=c_int,
    stats=POINTER,
)
GradArgs = _struct(
    "GradArgs",
    **_of(Rows, "logits grad"),
    transform=Transform,
    **_of(POINTER, "target normalizer scale"),
    vocab_start=c_int64,
    **_of(c_float, "label_smoothing z_loss"),
    vocab_size=c_int64,
    stored=POINTER,
)
StatsGradArgs = _struct("StatsGradArgs", grad=GradArgs, **_of(POINTER, "weight loss normalizer"))
RescaleArgs = _struct("RescaleArgs", grad=Rows, **_of(POINTER, "scale stored"))
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
    **_of(c_int64, "ranks rows columns rank_stride"),
    **_of(POINTER, "target weight"),
    **_of(c_float, "unit label_smoothing z_loss"),
    vocab_size=c_int64,
    **_of(POINTER, "loss normalizer"),
)
Metrics = _struct("Metrics", **_of(POINTER, "lse log_prob correct entropy"))
Scales = _struct("Scales", **_of(c_float, "unit log2 far inward cap slope"))
RowSplit = _struct("RowSplit", **_of(c_int32, "blocks segment"), parts=POINTER)
Holding = _struct("Holding", **_of(c_int32, "cluster columns"))

#: By the name that C++ knows them by.
STRUCTS = {
    **{f"fsl::{s.__name__}": s for s in (Rows, Transform, StatsArgs, GradArgs)},
    **{f"fsl::{s.__name__}": s for s in (StatsGradArgs, RescaleArgs, TargetsArgs, MergeArgs)},
    **{f"fsl::gpu::{s.__name__}": s for s in (Metrics, Scales, RowSplit, Holding)},
}

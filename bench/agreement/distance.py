"""The distance between the loss curves of two runs."""

import statistics
from dataclasses import dataclass

from ..sft.losses import IN_FP32, REVERSED

#: The runs whose distance from fp32 comes from bf16 alone: the same loss, written in PyTorch, with
#: its sums in two orders.
BASES = ("reference", REVERSED)
#: Runs that differ in rounding alone drift apart like these two. A run may be so many times further
#: from fp32 than they are: two runs give no exact limit.
ALLOWED = 1.5


@dataclass(frozen=True)
class Distance:
    """Between the losses of two runs, over all steps."""

    rms: float
    largest: float
    at_first: float  # at step 1, where the weights are the same


def between(losses, others):
    """The Distance of two lists of losses, step by step."""
    apart = [abs(loss - other) for loss, other in zip(losses, others, strict=True)]
    return Distance(statistics.fmean(d * d for d in apart) ** 0.5, max(apart), apart[0])


def from_fp32(losses):
    """{run: Distance from the fp32 run} of {run: losses}."""
    return {name: between(run, losses[IN_FP32]) for name, run in losses.items() if name != IN_FP32}


def allowed(distances):
    """The largest rms that bf16 alone explains."""
    return ALLOWED * max(distances[name].rms for name in BASES)


def too_far(distances):
    """The runs that are further from fp32 than bf16 alone explains."""
    limit = allowed(distances)
    return [name for name, distance in distances.items() if not distance.rms <= limit]


HEADS = ("rms to fp32", "largest", "at step 1", "rms to reference")


def rows(record):
    """[(run, its cells under HEADS)] of a record of `bench agreement`."""
    return [
        (name, [f"{number:.1e}" for number in _numbers(found)] + [_rms(record, name)])
        for name, found in record["from_fp32"].items()
    ]


def _numbers(found):
    return found["rms"], found["largest"], found["at_first"]


def _rms(record, name):
    other = record["from_reference"].get(name)
    return f"{other['rms']:.1e}" if other else ""

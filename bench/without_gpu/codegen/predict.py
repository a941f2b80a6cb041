"""Roofline from counted bytes and instructions: a prediction, never a measurement."""

from ..chips import Limits


def predict(limits: Limits, loop: dict) -> dict:
    """Predicted bytes per second of a loop (see loops.HotLoop) on all units, and the limiting pipe.

    The model takes each pipe alone and fully used: no latency, no tail, no cache. A device reaches
    less. For a loop that moves no bytes, `busy` is empty.
    """
    cycles: dict[str, float] = {}  # per unit and element
    for work, n in loop["work"].items():
        if work in limits.lanes:
            pipe, lanes = limits.lanes[work]
            cycles[pipe] = cycles.get(pipe, 0.0) + n / lanes
    if "every" in limits.lanes:
        pipe, lanes = limits.lanes["every"]
        cycles[pipe] = loop["instructions"] / lanes
    moved = loop["loaded"] + loop["stored"]
    seconds = {pipe: n / (limits.clock * limits.units) for pipe, n in cycles.items()}
    seconds["memory"] = moved / limits.bandwidth
    bound = max(seconds, key=seconds.get)
    return {
        "device": limits.device,
        "bound": bound,
        "bytes_per_second": moved / seconds[bound],
        "of_bandwidth": moved / seconds[bound] / limits.bandwidth,
        "busy": {
            pipe: s / seconds["memory"] for pipe, s in seconds.items() if moved and pipe != "memory"
        },
    }

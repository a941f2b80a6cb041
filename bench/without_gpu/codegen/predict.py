"""A roofline from counted bytes and instructions: a prediction, never a measurement."""

from ..chips import Limits


def predict(limits: Limits, loop: dict) -> dict:
    """Bytes per second of a loop (see loops.HotLoop) on all units, and the pipe that bounds it; of
    a loop that moves none, how long each pipe is busy is unknown.

    Each pipe alone, fully used: no latency, no tail, no cache. What a device reaches is below it.
    """
    cycles: dict[str, float] = {}  # of a unit, per element
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

"""Times of one case: all providers in turn, round after round, from cold caches.

Interleaved, a busy moment of the machine hits all alike; so does a clock that falls. Copying and
zeroing the same logits take their turns too: they are the roof, measured in the same moments.
"""

import math
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ..clock import Clock
from .problem import attached

FEWEST, MOST = 4, 25  # timings of a provider
SHARDED = 3  # with collectives every rank must time as often as its peers, whatever it measures
WARM_S = 0.05  # of untimed runs after that of the check; sharded none, as theirs are few
ROOF = ("copy", "zero")


@dataclass
class Contender:
    """`run(clock)` does the timed work once and `undo()` what must follow it, untimed."""

    name: str
    run: object
    undo: object = None
    seconds: list = field(default_factory=list)  # (forward, backward)


def provider_contender(name, function, problem, mode, writes):
    """Forward and backward of a provider on logits that are in no cache."""
    source, last = problem.source, []

    def run(clock):
        buffer = source.take()
        last[:] = [buffer]
        logits = attached(buffer)
        clock.start()
        loss = function(logits)
        clock.mark()
        if mode != "fwd":
            torch.autograd.grad(loss, logits, problem.upstream)
        clock.mark()

    return Contender(name, run, (lambda: source.restore(last[0])) if writes else None)


def roof_contenders(source):
    """Copying the logits, and storing zeros over them."""
    target = source.logits.clone()  # with pages: it is written untimed for once

    def timed(work):
        def run(clock):
            clock.start()
            work()
            clock.mark()
            clock.mark()

        return run

    return [
        Contender("copy", timed(lambda: target.copy_(source.take()))),
        Contender("zero", timed(target.zero_)),
    ]


def rounds(contenders, device, sharded, budget, failed):
    """Time all of them in turn; fills in `seconds`, and yields (name, failed(error)) of those that
    raise, which take no further turn.

    budget  seconds that one contender's timings should take; a number of timings that follows from
            it only where there is no collective.
    """
    clock, counts = Clock(device, ahead=True), {}

    def turn(contender, work):
        try:
            return work(contender, clock, sharded)
        except Exception as error:
            if sharded:  # peers are waiting in a collective: end them all
                raise
            counts.pop(contender.name, None)
            return failed(error)

    for contender in contenders:
        if sharded:
            counts[contender.name] = SHARDED
            continue
        one = turn(contender, _warm)
        if isinstance(one, dict):
            yield contender.name, one
        else:
            counts[contender.name] = _count(one, budget)
    total = max(counts.values())
    for step in range(total):
        for contender in contenders:
            # Spread evenly over the rounds, however few.
            count = counts.get(contender.name, 0)
            if (step + 1) * count // total == step * count // total:
                continue
            seconds = turn(contender, _once)
            if isinstance(seconds, dict):
                contender.seconds.clear()
                yield contender.name, seconds
            else:
                contender.seconds.append(seconds)


def _count(one, budget):
    return max(FEWEST, min(MOST, math.ceil(budget / max(one, 1e-9))))


def _warm(contender, clock, sharded):
    """Run to a steady state; seconds of the last run."""
    started = time.perf_counter()
    while True:
        seconds = sum(_once(contender, clock, sharded))
        if time.perf_counter() - started >= WARM_S:
            return seconds


def _once(contender, clock, sharded):
    if sharded:
        dist.barrier()  # else a collective would be charged for a peer's lateness
    contender.run(clock)
    intervals = clock.intervals()
    if contender.undo:
        contender.undo()
    return tuple(intervals)


def slowest(seconds):
    """Per timing the rank that took longest in all, [n][2]: the same on every rank."""
    if not seconds:
        return []
    mine = torch.tensor(seconds, dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    stacked = torch.stack(everyone)  # [ranks, n, 2]
    worst = stacked.sum(-1).argmax(0)
    return [stacked[rank, n].tolist() for n, rank in enumerate(worst.tolist())]

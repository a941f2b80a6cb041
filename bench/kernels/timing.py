"""Time one case. Providers are interleaved. Every run starts with cold caches.

Interleaving makes a busy moment of the machine, or a falling clock, affect all providers alike.
Copying and zeroing the same logits are interleaved with them. They give the roof, the bandwidth
that the machine has under the same conditions.
"""

import math
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ..clock import Clock
from .problem import attached

FEWEST, MOST = 4, 25  # timings of a provider
SHARDED = 3  # timings with collectives: every rank must run equally often
WARM_S = 0.05  # seconds of untimed runs after the check; none if sharded, where timings are few
ROOF = ("copy", "zero")


@dataclass
class Contender:
    """`run(clock)` does the timed work once. `undo()` follows it and is not timed."""

    name: str
    run: object
    undo: object = None
    seconds: list = field(default_factory=list)  # (forward, backward)


def provider_contender(name, function, problem, mode, writes):
    """Forward and backward of a provider, on logits that are in no cache."""
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
    """Copying the logits, and storing zeros over the copy."""
    target = source.logits.clone()  # written here, so its pages are mapped before timing

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
    """Time all contenders in turn, and fill in their `seconds`.

    If one raises, (name, failed(error)) is yielded, and that contender is not run again.

    budget  seconds that the timings of one contender should take. With collectives it is not used:
            every contender is timed SHARDED times.
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
    total = max(counts.values(), default=0)
    for step in range(total):
        for contender in contenders:
            # Spread the timings of a contender evenly over the rounds.
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
    """Run for WARM_S at least. Returns the seconds of the last run."""
    started = time.perf_counter()
    while True:
        seconds = sum(_once(contender, clock, sharded))
        if time.perf_counter() - started >= WARM_S:
            return seconds


def _once(contender, clock, sharded):
    if sharded:
        dist.barrier()  # otherwise a collective would include the wait for a peer
    contender.run(clock)
    intervals = clock.intervals()
    if contender.undo:
        contender.undo()
    return tuple(intervals)


def slowest(seconds):
    """The times of the slowest rank in each timing, [n][2]; the same on every rank."""
    if not seconds:
        return []
    mine = torch.tensor(seconds, dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    stacked = torch.stack(everyone)  # [ranks, n, 2]
    worst = stacked.sum(-1).argmax(0)
    return [stacked[rank, n].tolist() for n, rank in enumerate(worst.tolist())]

"""The work of the measuring processes: check and time a case, or record its memory.

A process sends every result at once, so no finished row is lost if the process is interrupted, runs
out of memory or dies. Before each piece of work it says what it is going to do.
"""

import ctypes
import time
import warnings
from dataclasses import asdict
from functools import partial

import torch
import torch.distributed as dist

from .. import machine
from ..ranks import send_to_parent
from . import timing
from .cases import copies as ring
from .footprint import footprint, largest
from .oracle import Oracle, run_once
from .problem import Problem, Source

#: glibc's mallopt(M_MMAP_THRESHOLD, bytes): smaller than measured buffers, larger than our tiles.
FRESH = -3, 2**23
OOM = ("can't allocate memory", "not enough memory", "out of memory")


def measure_times(work, device_type, mode, budget, until=None):
    """Check and time `work`: [(index, case, providers)]. Runs in every rank of run_ranks.

    Sends {"at": (index, name)} before it begins with a provider, and {"of": (index, name), ...}
    with the results of a row: a check, a status and reason, seconds [n][2].

    until  the time.monotonic() after which it begins with no row, or None; see `is_over`
    """
    for index, problem, providers in before_it_is_over(_problems(work, device_type), until):
        time_case(problem, providers, mode, budget, partial(tell_of, index), until)


def before_it_is_over(problems, until):
    """The first of (index, Problem, providers), and the others until the time is over."""
    for number, (index, problem, providers) in enumerate(problems):
        if number and is_over(until, problem):
            return
        yield index, problem, providers


def is_over(until, problem):
    """Whether to begin with no further row. Never with peers: they must agree on every row."""
    return until is not None and problem.group is None and time.monotonic() >= until


def tell_of(index, name, **what):
    """Send the results `what` of a row; without them, that the work on it begins."""
    tell_parent({"of" if what else "at": (index, name), **what})


def measure_memory(work, device_type):
    """Record peaks and send them as {"of": (index, name), "memory": ...}."""
    warm = set()
    for index, problem, providers in _problems(work, device_type, copies=1):
        for provider in providers:
            tell_of(index, provider.name)
            key = provider.name, problem.case.source
            usage, failure = tried(
                lambda p=provider, q=problem, w=key in warm: largest(footprint(p, q, w)), problem
            )
            warm.add(key)
            tell_of(index, provider.name, **(failure or {"memory": usage}))


def time_case(problem, providers, mode, budget, tell, until=None):
    """Check every provider against float64. Then time the roof and the providers that pass."""
    oracle = Oracle(problem)

    def contender(provider, function):
        timed = (provider.name, function, problem, mode, provider.writes)
        return timing.provider_contender(*timed)

    contenders = timing.roof_contenders(problem.source)
    check = partial(_checked, problem=problem, oracle=oracle)
    contenders += right_ones(problem, providers, check, contender, tell, until)
    time_in_turn(contenders, problem, problem.source.device, budget, tell)


def time_in_turn(contenders, problem, device, budget, tell):
    """Time the contenders, interleaved, and send their seconds."""
    sharded = problem.group is not None
    tell("timing")
    for name, failure in timing.rounds(contenders, device, sharded, budget, failed):
        tell(name, **failure)
    for contender in contenders:
        seconds = timing.slowest(contender.seconds) if sharded else contender.seconds
        if seconds:
            tell(contender.name, seconds=seconds)


def right_ones(problem, providers, check, contender, tell, until=None):
    """The contenders that pass the check. For the others the reason is sent.

    check      check(provider) -> (its function, Check)
    contender  contender(provider, its function) -> Contender
    until      of `is_over`: those that were checked by then are timed, the others stay pending
    """
    contenders = []
    for provider in providers:
        if contenders and is_over(until, problem):
            break
        tell(provider.name)
        made, failure = tried(partial(check, provider), problem)
        if failure:
            tell(provider.name, **failure)
            continue
        function, found = made
        tell(provider.name, check={**asdict(found), "ok": found.ok})
        if found.ok:
            contenders.append(contender(provider, function))
        else:
            tell(provider.name, status="wrong", reason=found.reason)
    return contenders


def _problems(work, device_type, copies=None):
    """Yield (index, Problem, providers). Logits are drawn again only if they differ.

    copies  buffers to use in turn; None: more than the last-level cache holds
    """
    device = prepare(device_type)
    source = None
    for index, case, providers in work:
        if source is None or source.case != case.source:
            source = None  # free it before the next is drawn
            tell_of(index, "logits")
            source = Source(case.source, device, copies or ring(case, machine.cache(device)))
        yield index, Problem(case, source), providers


def prepare(device_type):
    """Prepare this process to measure. Returns its device."""
    warnings.filterwarnings("ignore")  # peers warn about modules that they cannot import
    _always_fresh_pages()
    return _device(device_type)


def _always_fresh_pages():
    """Take every buffer from the system, as happens for the large buffers of a real batch.

    Otherwise glibc takes buffers of tens of MiB sometimes from memory that it kept, and the time of
    the same work varies by a factor of three.
    """
    try:
        ctypes.CDLL(None).mallopt(*FRESH)
    except (AttributeError, OSError, TypeError):  # not glibc
        pass


def _device(device_type):
    """This rank's device."""
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", dist.get_rank() if dist.is_initialized() else 0)
        torch.cuda.set_device(device)
    return device


def _checked(provider, problem, oracle):
    """(function, Check); the Check is the worst of all ranks."""
    function = provider.function(problem)
    loss, gradient = run_once(function, problem)
    check = oracle.check(loss, gradient, provider.precision)
    if problem.group is not None:
        everyone = [None] * problem.case.nproc
        dist.all_gather_object(everyone, check)
        check = max(everyone, key=lambda one: (not one.ok, one.gradient_error))
    return function, check


def tried(work, problem):
    """(result, None), or (None, failure). With peers it raises: they would wait for ever."""
    try:
        return work(), None
    except Exception as error:
        if problem.group is not None:
            raise
        return None, failed(error)


def failed(error):
    """The status and reason of a row whose provider raised an exception."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(s in text for s in OOM):
        return {"status": "OOM", "reason": text.strip().split("\n")[0][:200]}
    first = text.strip().split("\n")[0][:200]
    return {"status": "failed", "reason": f"{type(error).__name__}: {first}"}


def tell_parent(message):
    """Send a message, on the first rank."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        send_to_parent(message)

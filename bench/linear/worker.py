"""The work of the measuring processes: check and time a case, or record its memory."""

from dataclasses import asdict
from functools import partial

import torch

from ..kernels.footprint import Footprint
from ..kernels.timing import Contender
from ..kernels.worker import (
    before_it_is_over,
    prepare,
    right_ones,
    tell_of,
    time_in_turn,
    tried,
)
from ..memory import MemoryRecord
from . import products
from .case import Problem, run_once
from .oracle import Oracle


def measure_times(work, device_type, mode, budget, until=None):
    """Check and time `work`: [(index, case, providers)], beside the bare products."""
    for index, problem, providers in before_it_is_over(_problems(work, device_type), until):
        time_case(problem, providers, budget, partial(tell_of, index), until)


def measure_memory(work, device_type):
    """Record peaks and send them as {"of": (index, name), "memory": ...}."""
    for index, problem, providers in _problems(work, device_type):
        for provider in providers:
            tell_of(index, provider.name)
            usage, failure = tried(partial(footprint, provider, problem), problem)
            tell_of(index, provider.name, **(failure or {"memory": asdict(usage)}))


def time_case(problem, providers, budget, tell, until=None):
    """Check every provider against float64. Then time the products and those that pass."""
    check = partial(_checked, problem=problem, oracle=Oracle(problem))
    contender = partial(provider_contender, problem)
    contenders = right_ones(problem, providers, check, contender, tell, until)
    contenders.append(products.contender(problem))
    time_in_turn(contenders, problem, problem.device, budget, tell)


def provider_contender(problem, provider, function):
    """Forward and backward of a provider."""

    def run(clock):
        clock.start()
        loss = function(problem.hidden, problem.weight)
        clock.mark()
        torch.autograd.grad(loss, (problem.hidden, problem.weight), problem.upstream)
        clock.mark()

    return Contender(provider.name, run)


def footprint(provider, problem):
    """Peaks beyond the inputs; `full` and `resident` also beyond the two gradients."""
    function = provider.build(problem)
    if problem.device.type != "cpu":  # code is compiled, and libraries allocate what they keep
        run_once(function, problem)
    with MemoryRecord(problem.device) as record:
        record.mark("begin")
        loss = function(problem.hidden, problem.weight)
        record.mark("forward")
        grads = torch.autograd.grad(loss, (problem.hidden, problem.weight), problem.upstream)
        record.mark("end")
        del grads
    forward, full = record.usage("begin", "forward"), record.usage("begin", "end")
    gradients, resident = problem.case.gradient_bytes, full.resident_peak
    return Footprint(
        forward.peak,
        full.peak - gradients,
        None if resident is None else resident - gradients,
    )


def _checked(provider, problem, oracle):
    function = provider.build(problem)
    check = oracle.check(*run_once(function, problem), provider.precision(problem))
    return function, check


def _problems(work, device_type):
    device = prepare(device_type)
    for index, case, providers in work:
        tell_of(index, "inputs")
        yield index, Problem(case, device), providers

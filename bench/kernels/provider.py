"""What a provider of the loss is: a way to build it, and where it can run."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cases import Case


@dataclass(frozen=True)
class Provider:
    """One way to compute the masked mean loss and its gradient.

    name       for --provider
    build      build(problem) -> loss(logits [b, s, columns]) -> 0-d, with a graph; a module-level
               function or a partial of one, so that it can be sent to another process
    predicted  peak per element of the logits beyond them, (forward, forward + backward), each as
               (bytes, copies in the logits' dtype, fp32 copies of logits that are not fp32); for
               --dry-run and to choose a size
    scratch    bytes that do not grow with the logits, of the prediction
    reason     reason(case, device type) -> why it cannot run, or None; beyond what follows
    devices    device types it runs on
    module     what it needs, and `install`, the name to install it by
    sharded    works with a sharded vocabulary
    writes     True: it may overwrite the logits, so they are restored after every timing
    precision  "fp32", or "logits" when it rounds on the way to the logits' dtype
    softcap    has softcapping of its own; else it is done before, in fp32, as a model would
    early      computes the gradient in forward already: its fwd and bwd are no one else's
    gathers    collects the whole vocabulary on every process first
    """

    name: str
    title: str
    build: Callable
    predicted: tuple[tuple[int, int, int], tuple[int, int, int]]
    scratch: int = 0
    reason: Callable[[Case, str], str | None] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    module: str | None = None
    install: str | None = None
    sharded: bool = True
    writes: bool = False
    precision: str = "fp32"
    softcap: bool = False
    early: bool = False
    gathers: bool = False

    def reason_against(self, case, device_type):
        """Why it cannot run this case there, or None."""
        if device_type not in self.devices:
            return f"runs on {' and '.join(_DEVICES[name] for name in self.devices)}"
        if self.module is not None and not _found(self.module):
            return f"not installed: pip install {self.install or self.module}"
        if case.tp > 1 and not self.sharded:  # nor is there a rank whose shard it could compute
            return "needs the whole vocabulary on one process"
        return self.reason(case, device_type) if self.reason else None

    def function(self, problem):
        """loss(logits) for a problem, softcapping included."""
        loss, cap = self.build(problem), problem.case.softcap
        if not cap or self.softcap:
            return loss
        return lambda logits: loss(cap * torch.tanh(logits.float() / cap))

    def predicted_bytes(self, case):
        """(forward, forward + backward) peak of one process, beyond the logits: a prediction."""
        capped = case.softcap and not self.softcap  # the tanh and its product with cap, in fp32
        size, before = (4, _CAPPED) if capped else (case.element_size, 0)
        elements = case.rows * case.columns
        if self.gathers and case.nproc > 1:
            elements *= case.nproc
            before += size
        return tuple(
            elements * (before + fixed + copies * size + casts * (4 if size < 4 else 0))
            + self.scratch
            for fixed, copies, casts in self.predicted
        )


_DEVICES = {"cpu": "CPUs", "cuda": "GPUs"}
_CAPPED = 8


def _found(module):
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a parent package; a module without a spec
        return False

"""A provider of the loss: how to build it, and where it can run."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .cases import Case


@dataclass(frozen=True)
class Provider:
    """One way to compute the masked mean loss and its gradient.

    name       for --provider
    build      build(problem) -> loss(logits [b, s, columns]) -> 0-d, with a graph; a module-level
               function or a partial of one, so that it can be sent to another process
    predicted  peak beyond the logits, for each of their elements: (forward, forward + backward),
               each as (bytes, copies in the logits' dtype, fp32 copies of logits that are not
               fp32); for --dry-run and to choose a size
    scratch    predicted bytes that do not grow with the logits
    reason     reason(case, device type) -> why it cannot run, or None; checked in addition to
               devices, module and sharded
    devices    device types it runs on
    module     the module it needs; `install` is the name to install it by
    sharded    it works with a sharded vocabulary
    writes     it may overwrite the logits, so they are restored after every timing
    precision  "fp32", or "logits" if it rounds intermediate results to the logits' dtype
    softcap    it applies the softcap itself; otherwise tanh runs before it in fp32, as in a model
    one_read   it computes the gradient in forward, so its fwd and bwd cannot be compared
    gathers    it first gathers the whole vocabulary on every process
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
    one_read: bool = False
    gathers: bool = False

    def reason_against(self, case, device_type):
        """Why it cannot run this case on this device type, or None."""
        if reason := reason_against_peer(self, device_type):
            return reason
        if case.tp > 1 and not self.sharded:  # with nproc 1 too: no TP run can use it
            return "needs the whole vocabulary on one process"
        return self.reason(case, device_type) if self.reason else None

    def function(self, problem):
        """loss(logits) for a problem, including the softcap."""
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


def reason_against_peer(peer, device_type):
    """Why something with `devices`, `module` and `install` cannot run on a device type, or None."""
    if device_type not in peer.devices:
        return f"runs on {' and '.join(_DEVICES[name] for name in peer.devices)}"
    if peer.module is not None and not _found(peer.module):
        return f"not installed: pip install {peer.install or peer.module}"
    return None


def _found(module):
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a missing parent package, or a module without a spec
        return False


def source_of(module, path):
    """The text of a file in an installed package, without importing it; None if there is none."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    for folder in (found and found.submodule_search_locations) or ():
        if (file := Path(folder, path)).is_file():
            return file.read_text(encoding="utf-8")
    return None

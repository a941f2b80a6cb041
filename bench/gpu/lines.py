"""Runs the row kernels with chosen lines of the launch tables."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from unittest import mock

import torch

from fused_sft_loss.backends import selection
from fused_sft_loss.backends.contract import LOSS, RowFactor
from fused_sft_loss.rowmath import RowMath

ROUNDS = (0, 1, 4, 16)  # of the clusters that take rows in turn; 0: a cluster for each row
THREADS = (64, 128, 256, 512, 1024)
SEGMENTS = (4096, 8192, 16384, 32768, 65536)
WHOLE_ROW = 1 << 30  # kWholeRow of launch_table.h
TILE = 32  # logits of a thread


def backends(device):
    """{name: its lines} of all that can run. On a CPU: CUDA on the shim, Triton interpreted."""
    found = {}
    for name in ("cuda", "hip"):
        kernels = _native(name, device)
        if kernels is not None and hasattr(kernels.module, "try_line"):
            found[name] = Native(name, kernels)
    if selection.reason_against("triton", device) is None:
        found["triton"] = Triton(selection.load("triton"))
    return found


def _native(name, device):
    if device == "cuda":
        return selection.load(name) if selection.reason_against(name, device) is None else None
    from ..without_gpu.simt import build

    if name != "cuda" or build.missing():
        return None
    from ..without_gpu.simt import module

    return module.backend(name)


@dataclass(frozen=True)
class Line:
    threads: int
    segment: int
    rounds: int

    def __str__(self):
        segment = "the whole row" if self.segment == WHOLE_ROW else f"segments of {self.segment}"
        rounds = f", {self.rounds} rounds" if self.rounds else ""
        return f"{self.threads} threads, {segment}{rounds}"


class Native:
    """Lines of csrc/gpu/launch_table.h."""

    def __init__(self, name, kernels):
        self.name, self.kernels = name, kernels

    def uses(self, work):
        both = ("row_stats", "row_grad")
        return (*both, "row_stats_grad") if self.kernels.module.one_read_gains(work.math) else both

    def candidates(self, kernel, case):
        """The table's line, then others. Only NVIDIA can share a row that is read once."""
        chip = self.kernels.chip_of(torch.device("cuda", 0))
        table = Line(*self.kernels.module.launch_line(kernel, case.columns, chip))
        segments = SEGMENTS if kernel != "row_stats_grad" else (*SEGMENTS, WHOLE_ROW)
        if kernel == "row_stats_grad" and self.name == "hip":
            segments = (WHOLE_ROW,)
        yield table
        others = [Line(*shape, table.rounds) for shape in product(THREADS, segments)]
        if table.rounds:
            others += [replace(table, rounds=rounds) for rounds in ROUNDS]
        for line in others:
            threads, segment = line.threads, line.segment
            if line != table and segment % (TILE * threads) == 0 and _is_useful(segment, case):
                yield line

    @contextmanager
    def trying(self, kernel, line):
        self.kernels.module.try_line(kernel, line.threads, line.segment, line.rounds)
        try:
            yield
        finally:
            self.kernels.module.try_line(kernel, 0, 0, 0)


def _is_useful(segment, case):
    """Segments wider than the row are all alike; the narrowest of them stands for them."""
    return segment in (SEGMENTS[0], WHOLE_ROW) or segment // 2 < case.columns


class Triton:
    """Lines of triton_kernels/launch.py, as FUSED_SFT_LOSS_AUTOTUNE tries them."""

    def __init__(self, kernels):
        self.kernels = kernels

    def uses(self, work):
        from fused_sft_loss.triton_kernels import row_stats

        return (row_stats.table_name(LOSS, work.math.softcap), "row_grad")

    def candidates(self, kernel, case):
        from fused_sft_loss.triton_kernels import launch, tune

        device = torch.device("cpu" if self.kernels.INTERPRETED else "cuda")
        found = {}  # the table's line may be among the others, with another reason
        for shape in tune.candidates(launch.chip_of(device), kernel, case.columns):
            shown = _Shown(shape)
            found.setdefault(str(shown), shown)
        yield from found.values()

    def trying(self, kernel, line):
        return mock.patch.object(self.kernels, "choose", lambda *call: line.shape)


@dataclass(frozen=True)
class _Shown:
    shape: object  # of triton_kernels.launch

    def __str__(self):
        shape = self.shape
        return f"{shape.threads} threads, {shape.runs} runs, segments of {shape.segment}"


class Work:
    """The row kernels of a backend on the logits of a Problem."""

    def __init__(self, kernels, problem):
        self.kernels, self.problem, self.case = kernels, problem, problem.case
        self.logits = problem.source.logits
        self.device = self.logits.device
        self.target = problem.target.clamp(min=-1)  # -1 where a row is not scored
        self.weight = problem.weight
        self.math = RowMath(0, self.case.vocab, softcap=self.case.softcap or 0.0)
        self.factor = RowFactor(problem.upstream, self.weight)
        self.out = torch.empty_like(self.logits)

    def run(self, kernel):
        """Launch a kernel once. `kernel` is a use of a launch table."""
        name = kernel.partition(" ")[0]
        if name == "row_stats":
            return self._row_stats()
        if name == "row_grad":
            given = self.logits, self._normalizer, self.target, self.factor, self.math, self.out
            return self.kernels.row_grad(*given)
        factor = self.problem.upstream * self.weight
        given = self.logits, self.target, self.weight, factor, self.math, self.out
        return self.kernels.row_stats_grad(*given)

    def result(self, kernel):
        """(losses or None, gradient or None)."""
        self.out.fill_(torch.nan)
        made = self.run(kernel)
        if kernel.startswith("row_stats_grad"):
            return made[0], self.out.clone()
        if kernel.startswith("row_grad"):
            return None, self.out.clone()
        return self._merged(made)[0], None

    def same(self, kernel, result, exact):
        """Whether two results differ by no more than the order of sums explains."""
        (losses, grad), (losses_too, grad_too) = result, exact
        near = losses is None or torch.allclose(losses, losses_too, rtol=1e-5, atol=1e-5)
        if grad is None or not near:
            return near
        rounded = {torch.float32: 1e-5}.get(grad.dtype, 2**-7)
        return torch.allclose(grad, grad_too, rtol=rounded, atol=1e-9)

    def _row_stats(self):
        return self.kernels.row_stats(self.logits, self.target, self.weight, self.math, LOSS)

    def _merged(self, stats):
        return self.kernels.merge(stats.unsqueeze(0), self.target, self.weight, self.math)

    @cached_property
    def _normalizer(self):
        return self._merged(self._row_stats())[1]

"""Run Triton launches on CPU tensors: compiled for an NVIDIA GPU, executed as PTX."""

from dataclasses import replace
from functools import cache

import torch
from fused_sft_loss.triton_kernels import launch, merge, row_grad, row_stats, row_targets

from fused_sft_loss.backends.contract import RowFactor
from fused_sft_loss.rowmath import RowMath
from fused_sft_loss.scoring import Scoring
from fused_sft_loss.targets import Targets

from .. import triton_offline
from ..ptx import Kernel, Machine
from .passes import Passes, share


def execute(machine: Machine, chip, launches, edit=lambda text: text) -> None:
    """Run `launches` in order; buffers are named after arguments. `edit` may change the PTX."""
    for one in launches:
        compiled = triton_offline.compile(one, chip)
        names = [n for n, kind in compiled.src.signature.items() if kind != "constexpr"]
        arguments = [one.arguments[name] for name in names]
        for name, argument in zip(names, arguments, strict=True):
            if isinstance(argument, torch.Tensor):
                share(machine, name, argument)
        machine.launch(
            _parsed(edit(compiled.asm["ptx"])),
            one.programs,
            32 * compiled.metadata.num_warps,
            [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments],
            dynamic_shared=compiled.metadata.shared,
        )


@cache
def _parsed(text: str) -> Kernel:
    return Kernel(text)


class Run(Passes):
    """The passes with Triton's kernels, compiled for `target`."""

    def __init__(
        self, target, logits, labels, loss_mask=None, *, split=False, seed=None, edit=None,
        inplace=False, shift=True,
        vocab_size=None, **options,
    ):  # fmt: skip
        self.chip = triton_offline.CHIPS[target]
        # A chip with no multiprocessors to fill never splits a row.
        self.planned_for = self.chip if split else replace(self.chip, multiprocessors=0)
        self.logits, self.labels, self.loss_mask = logits, labels, loss_mask
        self.inplace, self.shift, self.seed = inplace, shift, seed
        self.edit = edit or (lambda text: text)
        self.math = RowMath(0, vocab_size or logits.shape[-1], **options)
        self.counts = {}

    def targets(self):
        self.unwritten_targets()
        plan = row_targets.plan(
            self.planned_for, Scoring(self.labels, self.loss_mask, None, self.shift, -100),
            self.math.vocab_size, Targets(self.target, self.weight, self.count, self.weight_sum),
        )  # fmt: skip
        self._run("targets", plan)

    def statistics(self, columns=4):
        self.stats = torch.full((self.labels.numel(), columns), float("nan"))
        shape = self._shape(row_stats.table_name(columns, self.math.softcap))
        plan = row_stats.plan(
            self.planned_for, shape, self.math, self.logits, self.target, self.weight, self.stats,
        )  # fmt: skip
        self._run("statistics", plan)

    def merged(self):
        self.unwritten_losses()
        plan = merge.plan(
            self.planned_for, self.math, self.stats[None], self.target, self.weight, self.loss,
            self.normalizer,
        )  # fmt: skip
        self._run("merge", plan)

    def gradient(self):
        self.grad = self.logits if self.inplace else self.unwritten_gradient()
        shape = self._shape("row_grad")
        plan = row_grad.plan(
            self.planned_for, shape, self.math, self.logits, self.normalizer, self.target,
            RowFactor(self.weight), self.grad,
        )  # fmt: skip
        self._run("gradient", plan)

    def _shape(self, kernel):
        return launch.shape_for(self.chip, kernel, self.logits.shape[-1])

    def _run(self, name, plan):
        machine = Machine(self.seed)
        execute(machine, self.chip, plan, self.edit)
        self.counts[name] = machine.counts

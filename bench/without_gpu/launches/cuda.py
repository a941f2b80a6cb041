"""Launch the CUDA kernels, compiled by nvcc for sm_90, on CPU tensors in the PTX interpreter."""

from functools import cache
from pathlib import Path

import numpy as np
import torch

from fused_sft_loss import rowmath
from fused_sft_loss.backends.contract import statistics_for

from ..codegen import instances, launch_table, toolchains
from ..ptx import Kernel, Machine, entries
from .cuda_structs import (
    Divisor,
    GradArgs,
    Holding,
    MergeArgs,
    Metrics,
    RowFactor,
    RowMath,
    Rows,
    RowSplit,
    StatsArgs,
    StatsGradArgs,
    TargetsArgs,
    Units,
)
from .passes import Passes, share

TARGET = "sm_90"
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
VECTOR_THREADS = 256
LOG2E = np.float32(1.4426950408889634)
FOLDER = Path(__file__).parents[3] / "build/codegen"


@cache
def modules() -> dict[str, str]:
    """Maps the mangled name of each kernel to the PTX of its module."""
    made = toolchains.need("cuda").compile([TARGET], FOLDER, 2, "-ptx")[TARGET]
    return {name: text for text in map(bytes.decode, made) for name in entries(text)}


@cache
def kernel(name: str, dtype=None, statistics=None, softcap=0, shifted=False) -> Kernel:
    wanted = instances.Instance(name, dtype, statistics, softcap, shifted)
    mangled = next(m for m in modules() if instances.instance(m) == wanted)
    return Kernel(modules()[mangled], mangled)


def line(kernel: str, columns: int) -> launch_table.Line:
    """The same choice as line_for in launch_table.h."""
    lines = launch_table.lines(TARGET, kernel)
    return next(one for one in lines if columns <= (one.columns or columns))


class Run(Passes):
    """The passes with nvcc's kernels.

    `split`: one block for every segment of a row. `edit` may change the PTX of a kernel. `grad`
    receives the gradient, if given.
    """

    def __init__(
        self, logits, labels, loss_mask=None, *, split=False, seed=None, edit=None,
        grad=None, shift=True,
        vocab_size=None, **options,
    ):  # fmt: skip
        self.logits, self.labels, self.loss_mask = logits, labels, loss_mask
        self.split, self.seed, self.edit, self.shift = split, seed, edit, shift
        self.given_grad = grad
        self.vocab_size = vocab_size or logits.shape[-1]
        math = rowmath.RowMath(0, self.vocab_size, **options)
        self.math = RowMath(*math)
        self.wanted = statistics_for(math)
        self.options = {"dtype": str(logits.dtype)[6:], "softcap": math.cap}
        self.counts = {}

    def targets(self):
        (batch, seq), rows, threads = self.labels.shape, self.labels.numel(), 512
        self.unwritten_targets()
        mask = self.loss_mask
        named = self._named("labels target weight count weight_sum")
        args = TargetsArgs(
            **named, mask=0 if mask is None else mask.data_ptr(), batch=batch, seq=seq,
            label_stride_b=self.labels.stride(0), label_stride_s=self.labels.stride(1),
            mask_stride_b=0 if mask is None else mask.stride(0),
            mask_stride_s=0 if mask is None else mask.stride(1),
            shift=self.shift, ignore_index=-100, vocab_size=self.vocab_size,
        )  # fmt: skip
        blocks = 1 + -(-rows // threads)
        self._run("targets", kernel("row_targets"), blocks, threads, args)

    def statistics(self, wanted=None):
        wanted = wanted or self.wanted
        rows, chosen = self.labels.numel(), line("row_stats", self.logits.shape[-1])
        segments = -(-self.vocab_size // chosen.segment)
        self.stats = torch.full((rows, wanted), float("nan"))
        self.parts = torch.full((rows, segments, wanted), float("nan"))
        splits = segments if self.split else 1
        args = StatsArgs(
            logits=self._rows(self.logits), math=self.math, want=wanted,
            **self._named("target weight stats"),
        )  # fmt: skip
        shifted = skew(self.logits) != 0
        code = kernel("row_stats", statistics=wanted, shifted=shifted, **self.options)
        split = RowSplit(
            divisor(splits), chosen.segment, segments, segments // splits,
            self.parts.data_ptr() if splits > 1 else 0,
        )  # fmt: skip
        self._run("statistics", code, rows * splits, chosen.threads, args, self._units(), split)
        if splits > 1:
            pointers = (t.data_ptr() for t in (self.parts, self.weight, self.stats))
            fold = kernel("fold_segments", statistics=wanted)
            self._run(
                "fold", fold, blocks(rows), VECTOR_THREADS, *pointers, rows, segments, self._unit(),
            )  # fmt: skip

    def merged(self):
        rows, statistics = self.stats.shape
        self.unwritten_losses()
        args = MergeArgs(
            **self._named("stats target weight loss normalizer"), ranks=1, rows=rows,
            statistics=statistics, rank_stride=rows * statistics, math=self.math,
        )  # fmt: skip
        code = kernel("merge", statistics=statistics)
        self._run("merge", code, blocks(rows), VECTOR_THREADS, args, Metrics())

    def gradient(self):
        logits, given = self.logits, self.given_grad
        grad = self.grad = self.unwritten_gradient() if given is None else given
        rows, chosen = self.labels.numel(), line("row_grad", logits.shape[-1])
        segments = -(-logits.shape[-1] // chosen.segment)
        splits = segments if self.split else 1
        args = self._grad_args(grad)
        same = grad is logits or skew(logits) == skew(grad) >= 0
        code = kernel("row_grad", shifted=not same, **self.options)
        self._run(
            "gradient", code, rows * splits, chosen.threads, args, self._units(), divisor(splits),
            segments // splits * chosen.segment,
        )  # fmt: skip

    def one_read(self, held=None, blocks=1):
        """Replaces statistics, merge and gradient. `blocks` blocks take the rows in turn, and hold
        `held` columns of a row on chip, by default all. Shifted rows have a block each."""
        logits, given = self.logits, self.given_grad
        grad = self.grad = self.unwritten_gradient() if given is None else given
        self.unwritten_losses()
        chosen = line("row_stats_grad", logits.shape[-1])
        whole = -(-self.vocab_size // 8) * 8
        held = held or whole
        args = StatsGradArgs(grad=self._grad_args(grad), **self._named("weight loss normalizer"))
        shifted = skew(logits) != 0 or skew(grad) != 0
        code = kernel("row_stats_grad", shifted=shifted, **self.options)
        self._run(
            "one read", code, self.labels.numel() if shifted else blocks, chosen.threads, args,
            self._units(), Holding(divisor(1), whole, held, blocks),
            dynamic_shared=held * logits.element_size() + 16,
        )  # fmt: skip
        return self

    def _grad_args(self, grad) -> GradArgs:
        return GradArgs(
            logits=self._rows(self.logits), grad=self._rows(grad), math=self.math,
            **self._named("target normalizer"), factor=RowFactor(self.weight.data_ptr(), 1),
        )  # fmt: skip

    def _rows(self, tensor) -> Rows:
        batch, seq, columns = tensor.shape
        strides = dict(zip(("stride_b", "stride_s"), tensor.stride()[:2], strict=True))
        return Rows(
            data=tensor.data_ptr(), dtype=CODES[tensor.dtype], batch=batch, seq=seq,
            columns=columns, valid=self.vocab_size, by_seq=divisor(seq), **strides,
        )  # fmt: skip

    def _units(self) -> Units:
        """The same values as units_of in row_math.cuh."""
        logit_scale, cap = self.math.logit_scale, self.math.softcap
        unit = self._unit()
        unit_log2 = np.float32(unit) * LOG2E
        far = 2.0 ** min(31 - np.frexp(unit_log2)[1], 127)
        inward = np.float32(logit_scale) / np.float32(cap) if cap else 0.0
        if self.options["softcap"] == instances.SMALL_CAP:
            inward *= 2 * LOG2E
        return Units(unit, unit_log2, far, inward, cap, logit_scale)

    def _unit(self) -> float:
        return 1.0 if self.math.softcap else self.math.logit_scale

    def _named(self, names: str) -> dict[str, int]:
        return {name: getattr(self, name).data_ptr() for name in names.split()}

    def _run(self, name, code, grid, threads, *arguments, dynamic_shared=0):
        machine = Machine(self.seed)
        for attribute, tensor in list(vars(self).items()):
            if isinstance(tensor, torch.Tensor):
                share(machine, attribute, tensor)
        if self.edit:
            code = Kernel(self.edit(code), code.name)
        packed = [a if isinstance(a, (int, float)) else bytes(a) for a in arguments]
        machine.launch(code, grid, threads, packed, dynamic_shared)
        self.counts[name] = machine.counts


def blocks(rows: int) -> int:
    return -(-rows // VECTOR_THREADS)


def skew(tensor: torch.Tensor) -> int:
    """Like common_skew in dispatch.h: bytes from a multiple of 16 to each row's start, -1 if rows
    differ."""
    agree = all(
        n == 1 or stride * tensor.element_size() % 16 == 0
        for n, stride in zip(tensor.shape[:2], tensor.stride()[:2], strict=True)
    )
    return tensor.data_ptr() % 16 if agree else -1


def divisor(value: int) -> Divisor:
    """The same values as Divisor in csrc/args.h."""
    shift = (value - 1).bit_length()
    return Divisor(value, -(-(1 << (31 + shift)) // value), shift)

"""The cases to measure: a model's logits, their shards, and how many rows are scored."""

from dataclasses import dataclass, replace

import torch

from ..errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEGREES = (1, 2, 4, 8)  # of tensor parallelism
FRACTIONS = (1.0, 0.7, 0.5, 0.3, 0.1)
MODES = ("fwd", "bwd", "full")
BATCH = 2  # sequences, without --shape
GPU_ROWS = 4096  # a micro-batch of SFT on one accelerator
SMALLEST_CPU_LOGITS = 20 * 2**20
CPU_LOGITS_PER_CORE = 10 * 2**20  # limit: all providers on all models take minutes
FEWEST_ROWS = 8
MOST_COPIES = 64  # a limit for tiny logits, whose speed does not matter
MEGATRON_MULTIPLE = 128  # Megatron's make-vocab-size-divisible-by


@dataclass(frozen=True)
class Model:
    """A model's vocabulary: `vocab` ids in `padded` columns of logits."""

    name: str
    vocab: int
    padded: int
    softcap: float | None = None

    def columns(self, tp):
        """Columns of one of `tp` shards. If tp does not divide `padded`, pad as Megatron does."""
        if self.padded % tp == 0:
            return self.padded // tp
        multiple = MEGATRON_MULTIPLE * tp
        return -(-self.padded // multiple) * multiple // tp


MODELS = {
    model.name: model
    for model in (
        Model("llama3-8b", 128256, 128256),
        Model("qwen2.5", 151936, 152064),
        Model("gemma2", 256000, 256000, softcap=30.0),
        Model("mistral-nemo", 131072, 131072),
        Model("gpt2", 50257, 50257),
    )
}


@dataclass(frozen=True)
class Case:
    """The logits [batch, seq, columns] of one process, and the fraction of scored rows.

    tp     number of shards of the vocabulary
    nproc  processes that compute together: tp or 1. With 1, one shard is computed alone, as a whole
           problem of `columns` ids.
    vocab  ids without padding, in all shards that are computed
    """

    model: str
    vocab: int
    columns: int
    tp: int
    nproc: int
    batch: int
    seq: int
    dtype: str
    scored: float
    softcap: float | None = None
    seed: int = 0

    @property
    def rows(self):
        return self.batch * self.seq

    @property
    def scored_rows(self):
        """Scored rows: a response at the end of each sequence, whose last row has no label."""
        return self.batch * min(round(self.seq * self.scored), self.seq - 1)

    @property
    def element_size(self):
        return DTYPES[self.dtype].itemsize

    @property
    def logits_bytes(self):
        return self.rows * self.columns * self.element_size

    @property
    def vocab_size(self):
        """The argument of sft_loss: ids without padding, or None if there is no padding."""
        return None if self.vocab == self.columns * self.nproc else self.vocab

    @property
    def title(self):
        if self.tp == 1:
            return f"{self.model}, {self.dtype}"
        kind = f"{self.nproc} processes" if self.nproc > 1 else "one shard"
        return f"{self.model} TP {self.tp} ({kind}), {self.dtype}"

    @property
    def name(self):
        return f"{self.title}, {self.scored:.0%} scored"

    @property
    def source(self):
        """The case without its fraction. Cases with the same `source` can share their logits."""
        return replace(self, scored=1.0)

    def minimum_bytes(self, mode):
        """(bytes that must be moved, bytes that must be zeroed) in one process.

        A scored row is read for the loss, and read and written for its gradient. The gradient of
        any other row is zeros. With e bytes per element and a scored fraction f, forward takes e*f
        and backward 2*e*f + e*(1 - f). For bf16 see "Bytes" in docs/design.md.
        """
        row = self.columns * self.element_size
        unscored = self.rows - self.scored_rows
        reads = {"fwd": 1, "bwd": 2, "full": 3}[mode]
        return reads * self.scored_rows * row, 0 if mode == "fwd" else unscored * row


def copies(case, cache):
    """Number of buffers to use in turn, so that a reused one has left the last-level cache."""
    return min(MOST_COPIES, 1 + max(1, -(-(cache or 0) // case.logits_bytes)))


def model_case(model, tp, nproc, batch, seq, dtype, scored, seed):
    """A Case of `model`; `nproc` is 1 or tp."""
    columns = model.columns(tp)
    whole = nproc == tp
    return Case(
        model=model.name,
        vocab=model.vocab if whole else min(model.vocab, columns),
        columns=columns,
        tp=tp,
        nproc=nproc,
        batch=batch,
        seq=seq,
        dtype=dtype,
        scored=scored,
        softcap=model.softcap,
        seed=seed,
    )


def wanted_bytes(device_type, cache, cores, row_bytes):
    """Bytes of logits: on a CPU of all processes together, on a GPU of each process.

    On a CPU they are as large as the last-level cache, but not larger than `cores` read in a few
    milliseconds. Copies are used in turn, so that they are in no cache.
    """
    if device_type == "cuda":
        return GPU_ROWS * row_bytes
    return max(SMALLEST_CPU_LOGITS, min(cache or 0, CPU_LOGITS_PER_CORE * cores))


def fit(make, wanted, free, needed):
    """The largest case `make(seq)` with at most `wanted` bytes of logits that fits into `free`.

    wanted  bytes of logits of one process
    free    bytes, None if unknown
    needed  needed(case) -> all bytes that the case is predicted to need
    Raises UserError if not even FEWEST_ROWS fit.
    """
    fewest = FEWEST_ROWS // BATCH
    smallest = make(fewest)
    seq = max(fewest, round(wanted * smallest.seq / smallest.logits_bytes))
    if free is not None:
        seq = min(seq, _longest(smallest, free, needed))
    if seq < fewest:
        raise UserError(
            f"{smallest.title}: expected {needed(smallest) / 2**20:.0f} MiB free for {FEWEST_ROWS} "
            f"rows, got {free / 2**20:.0f} MiB; choose a smaller model or fewer providers"
        )
    return make(seq)


def must_fit(case, free, needed):
    """Raise UserError if a requested case does not fit. It names the longest sequence that fits."""
    need = needed(case)
    if free is None or need <= free:
        return
    seq = _longest(case, free, needed)
    shape = f"{case.batch},{seq},{case.vocab}"
    advice = f"the largest that fits is --shape {shape}" if seq >= 2 else "not even two rows fit"
    raise UserError(
        f"{case.name}: expected {need / 2**20:.0f} MiB free for {case.rows} rows of {case.columns} "
        f"columns, got {free / 2**20:.0f} MiB; {advice}"
    )


def _longest(case, free, needed):
    """The longest sequence that fits into `free`. `needed` grows linearly with the sequence."""
    one, two = (needed(replace(case, seq=seq)) for seq in (1, 2))
    return int((free - (one - (two - one))) / (two - one))

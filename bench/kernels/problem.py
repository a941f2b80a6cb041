"""The tensors of a case: logits as a model returns them, and copies that are in no cache."""

import torch
import torch.distributed as dist

from .cases import DTYPES

UPSTREAM = 0.37  # not 1: some peers skip work for 1
PADDING = -1e4  # logits in padded columns: providers without padding get a softmax of 0 there
SPREAD = 4.0  # standard deviation of the logits
POOL = 2**18  # numbers drawn in addition to two rows


class Source:
    """Logits [batch, seq, columns] of a case's shard, and a ring of copies to work on.

    Between two uses of a copy, more bytes than the last-level cache holds are touched. So every
    timing starts with a cold cache.
    """

    def __init__(self, case, device, copies=2):
        self.case, self.device = case, torch.device(device)
        self.rank = dist.get_rank() if case.nproc > 1 else 0
        self.logits = self._draw()
        self.ring = [self.logits.clone() for _ in range(copies)]
        self._next = 0

    def _draw(self):
        """Each row is another slice of one pool of noise. Drawing every number would take longer
        than all measurements."""
        case, device = self.case, self.device
        generator = torch.Generator(device).manual_seed(case.seed * 1000 + self.rank)
        pool = torch.randn(2 * case.columns + POOL, generator=generator, device=device)
        pool = pool.mul_(SPREAD).to(DTYPES[case.dtype])
        starts = torch.randint(
            0, len(pool) - case.columns, (case.rows,), generator=generator, device=device
        )
        shape = (case.rows, case.columns)
        logits = torch.empty(shape, dtype=pool.dtype, device=device)
        for row, start in zip(logits, starts.tolist(), strict=True):
            row.copy_(pool[start : start + case.columns])
        true = case.vocab - self.rank * case.columns
        if true < case.columns:
            logits[:, max(true, 0) :] = PADDING
        return logits.view(case.batch, case.seq, case.columns)

    def take(self):
        """The next buffer of the ring. It holds the logits."""
        self._next = (self._next + 1) % len(self.ring)
        return self.ring[self._next]

    def restore(self, buffer):
        buffer.copy_(self.logits)


class Problem:
    """A case's labels and mask on the device, in the forms that the providers take.

    labels  [b, s] int64, the input ids        mask    [b, s] fp32, aligned with labels
    target  [b*s] int64, of each row, -100 where it is not scored
    inside  [b*s] int64, target with 0 instead of -100: for losses without an ignored label
    weight  [b*s] fp32                         total   0-d fp32, its sum
    group   the process group over which the vocabulary is sharded, None on one process
    """

    def __init__(self, case, source):
        self.case, self.source = case, source
        self.group = dist.group.WORLD if case.nproc > 1 else None
        generator = torch.Generator().manual_seed(case.seed)  # the same labels on every rank
        shape = (case.batch, case.seq)
        labels = torch.randint(0, case.vocab, shape, generator=generator)
        mask = torch.zeros(shape)
        mask[:, case.seq - case.scored_rows // case.batch :] = 1.0
        target = torch.full(shape, -100)
        target[:, :-1] = labels[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        target = target.view(-1)
        weight = (target != -100).float()
        self.labels, self.mask, self.target, self.inside, self.weight, self.total = (
            tensor.to(source.device)
            for tensor in (labels, mask, target, target.clamp(min=0), weight, weight.sum())
        )
        self.upstream = torch.tensor(UPSTREAM, device=source.device)

    @property
    def first(self):
        """Global id of this process's first column."""
        return self.source.rank * self.case.columns

    def mean(self, losses):
        """The masked mean of per-row losses of any shape."""
        return (losses.view(-1) * self.weight).sum() / self.total


class _Model(torch.autograd.Function):
    """Stands for the model that returns the logits. Its result is neither a leaf nor a view."""

    @staticmethod
    def forward(ctx, parameter, buffer):
        return buffer.new_empty(0).set_(buffer)  # the same memory

    @staticmethod
    def backward(ctx, gradient):
        return None, None


def attached(buffer):
    """`buffer` as logits that need a gradient, without a copy.

    In-place backward refuses a leaf. A view of a leaf does not help: Megatron writes to fp32 logits
    in place, which would take the view out of the graph.
    """
    return _Model.apply(torch.zeros((), requires_grad=True), buffer)

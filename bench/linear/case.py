"""The case to measure: hidden states, an output layer, labels and a mask."""

from dataclasses import asdict, dataclass

import torch

from fused_sft_loss.linear.products import dtype_of_products

from ..kernels.cases import DTYPES
from ..kernels.problem import SPREAD, UPSTREAM


@dataclass(frozen=True)
class Case:
    """Hidden states `[1, rows, hidden]` and a weight `[vocab, hidden]`.

    scored      fraction of scored rows: a response at the end of the sequence
    chunk_rows  rows of a chunk; None: each provider's own choice
    limit       seconds; a provider that is predicted to take longer is left out
    """

    rows: int
    hidden: int
    vocab: int
    scored: float
    dtype: str
    chunk_rows: int | None = None
    limit: float = 60.0
    seed: int = 0

    nproc = tp = 1  # the vocabulary is not sharded

    @property
    def scored_rows(self):
        """The last row has no label."""
        return min(round(self.rows * self.scored), self.rows - 1)

    @property
    def name(self):
        chunk = f", chunks of {self.chunk_rows} rows" if self.chunk_rows else ""
        size = f"{self.rows} x {self.hidden} x {self.vocab} {self.dtype}"
        return f"{size}, {self.scored:.0%} scored{chunk}"

    @property
    def torch_dtype(self):
        return DTYPES[self.dtype]

    @property
    def gradient_bytes(self):
        """Of hidden and weight."""
        return (self.rows + self.vocab) * self.hidden * self.torch_dtype.itemsize

    @property
    def logits_bytes(self):
        """Of all rows, in the dtype of hidden."""
        return self.rows * self.vocab * self.torch_dtype.itemsize

    def chunk_bytes(self, device_type):
        """Of one chunk of logits, in the dtype in which products are computed; None without
        chunk_rows."""
        if self.chunk_rows is None:
            return None
        dtype = dtype_of_products(torch.empty(0, dtype=self.torch_dtype, device=device_type))
        return min(self.chunk_rows, self.scored_rows) * self.vocab * dtype.itemsize

    @property
    def operations(self):
        """Additions and multiplications of one product of the scored rows."""
        return 2 * self.scored_rows * self.hidden * self.vocab

    def record(self):
        sizes = {key: getattr(self, key) for key in ("name", "scored_rows", "gradient_bytes")}
        return {**asdict(self), **sizes, "logits_bytes": self.logits_bytes}


class Problem:
    """The tensors of a case.

    hidden  [1, rows, hidden], weight [vocab, hidden]: leaves that need gradients
    labels  [1, rows] int64, not shifted           mask    [1, rows] fp32, aligned with labels
    target  [rows] int64, of each row, -100 where it is not scored
    at      [R] int64, the scored rows
    """

    group = None  # one process

    def __init__(self, case, device):
        self.case, self.device = case, torch.device(device)
        generator = torch.Generator(self.device).manual_seed(case.seed)

        def drawn(*shape, deviation):
            numbers = torch.randn(*shape, generator=generator, device=self.device)
            return numbers.mul_(deviation).to(case.torch_dtype).requires_grad_()

        self.hidden = drawn(1, case.rows, case.hidden, deviation=1.0)
        self.weight = drawn(case.vocab, case.hidden, deviation=SPREAD / case.hidden**0.5)
        shape = (1, case.rows)
        self.labels = torch.randint(0, case.vocab, shape, generator=generator, device=self.device)
        self.mask = torch.zeros(shape, device=self.device)
        self.mask[:, case.rows - case.scored_rows :] = 1.0
        self.target = torch.full((case.rows,), -100, device=self.device)
        self.target[case.rows - 1 - case.scored_rows : -1] = self.labels[0, -case.scored_rows :]
        self.at = (self.target >= 0).nonzero().view(-1)
        self.upstream = torch.tensor(UPSTREAM, device=self.device)

    @property
    def flat(self):
        """The hidden states [rows, hidden]."""
        return self.hidden.view(self.case.rows, self.case.hidden)


def run_once(function, problem):
    """(loss, gradient of hidden [rows, hidden], gradient of weight) of a provider."""
    loss = function(problem.hidden, problem.weight)
    hidden, weight = torch.autograd.grad(loss, (problem.hidden, problem.weight), problem.upstream)
    return loss.detach(), hidden.view(problem.flat.shape), weight

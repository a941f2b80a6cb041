"""Small training problems for kernels in the PTX interpreter, and the check of their results."""

import torch
from oracle import evaluate

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 1.5}

# Columns: less than a tile; whole tiles and a rest, in unaligned rows; segments, split or not.
SHAPES = {
    "short": (1000, {}),
    "unaligned": (4099, {}),
    "segments": (17000, {}),
    "split": (17000, {"split": True}),
    "options": (4100, EVERYTHING),
    "padded": (4104, {"vocab_size": 4001, "label_smoothing": 0.1}),
}


def problem(dtype, columns, valid=None):
    """(logits `[1, 4, columns]`, labels, mask). After the shift: a row of weight 1, a row of weight
    0.5, a masked row that holds NaN and must not be read, and the last row, which has no target."""
    logits = (torch.randn(1, 4, columns) * 4).to(dtype)
    logits[0, 2] = float("nan")
    labels = torch.randint(0, valid or columns, (1, 4))
    return logits, labels, torch.tensor([[1.0, 1.0, 0.5, 0.0]])


def check(run, dtype, **options):
    expected = evaluate(run.logits, run.labels, run.loss_mask, **options)
    assert int(run.count) == 2 and float(run.weight_sum) == 1.5
    torch.testing.assert_close(run.loss.double(), expected.losses, rtol=1e-6, atol=1e-6)
    # Rounded once: the tolerance is half a unit in the last place plus the error of fp32.
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 3e-6}[dtype]
    grad = run.grad[0].double()
    smallest = 2**-25 if dtype == torch.float16 else 1e-9  # half of fp16's least subnormal
    torch.testing.assert_close(grad, expected.grad, rtol=unit * 1.01, atol=smallest * 1.01)
    assert not run.grad[0, 2:].count_nonzero()


def rows_at(logits, stride):
    """The same `[1, s, v]` numbers, in rows `stride` elements apart."""
    memory = torch.full((logits.shape[1], stride), 7.0, dtype=logits.dtype)
    memory[:, : logits.shape[2]] = logits[0]
    return memory[None, :, : logits.shape[2]]


def wide(counts, buffer):
    """Bytes moved by accesses of 16 bytes or more."""
    return sum(n for (name, size), n in counts.widths.items() if name == buffer and size >= 16)

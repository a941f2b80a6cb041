"""The product of options on the Triton kernels, a fixed sample of it, against the oracle.

The interpreter has time for a hundred calls. Hypothesis would spend them on its simplest examples,
so these calls are drawn evenly. Run by `test_triton_interpreted.py`.
"""

from random import Random

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    VOCABULARIES,
    build,
    expected,
    largest_term,
    run,
    storage_grad,
)
from closeness import assert_grad, assert_losses

import fused_sft_loss as fsl

SMALL = [v for v in VOCABULARIES if v <= 1000]
LARGE = [v for v in VOCABULARIES if v > 1000]


def drawn(seed: int):
    """A case with scored rows, and the upstream gradient of its rows."""
    random = Random(seed)
    v = random.choice(LARGE if seed % 8 == 0 else SMALL)
    b, s = (1, 3) if v > 1000 else (random.randint(1, 3), random.randint(3, 6))
    options = {
        "shift": random.random() < 0.7,
        "label_smoothing": random.choice([0.0, 0.0, 0.1, 0.5]),
        "z_loss": random.choice([0.0, 1e-3]),
        "softcap": random.choice([None, 5.0, 30.0]),
        "logit_scale": random.choice([1.0, 0.5, 2.5]),
        "vocab_size": random.choice([None, None, max(1, v - 1), v // 2 + 1]),
        "ignore_index": random.choice([-100, -1]),
    }
    if options["shift"] and random.random() < 0.3:
        options["cu_seqlens"] = torch.tensor([0, random.randint(2, s), b * s], dtype=torch.int32)
    mask = random.choice(["none", "bool", "int", "half", "float", "strided"])
    view = random.choice([view for view in LAYOUTS if view != "batch_expanded"])
    case = build(view, random.choice(DTYPES), b, s, v, seed, mask, options)
    return case, torch.rand(b * s) * 3 - 1


@pytest.mark.parametrize("seed", range(96))
def test_losses_and_gradients(seed):
    case, upstream = drawn(seed)
    want = expected(case, upstream)
    losses, grad = run(case, "triton", upstream)
    assert_losses(losses, want)
    largest = largest_term(case, want, upstream)
    assert_grad(grad, storage_grad(case, want.grad), case.storage.dtype, largest)


def test_the_draw_covers_every_value_of_every_option():
    cases = [drawn(seed)[0] for seed in range(96)]
    scored = [case for case in cases if expected(case).weight.count_nonzero()]
    assert len(scored) > 80
    for name in ("shift", "label_smoothing", "z_loss", "softcap", "logit_scale"):
        for dtype in DTYPES:
            values = {case.options[name] for case in scored if case.storage.dtype == dtype}
            assert len(values) == {"shift": 2, "z_loss": 2}.get(name, 3), (name, dtype)
    assert len({case.view for case in scored}) == len(LAYOUTS) - 1
    assert {case.columns for case in scored} == set(VOCABULARIES)


@pytest.mark.parametrize("seed", range(1000, 1030))
def test_metrics(seed):
    case, _ = drawn(seed)
    if case.loss_mask is not None:
        case.loss_mask = case.loss_mask != 0
    want = expected(case)
    got = fsl.token_metrics(
        case.logits(case.storage),
        case.labels,
        case.loss_mask,
        backend="triton",
        **case.call_options(),
    )
    size = 1 + want.lse.abs() + want.losses.abs()
    for field in ("log_prob", "lse", "entropy"):
        value = getattr(got, field).flatten().double()
        torch.testing.assert_close(value / size, getattr(want, field) / size, rtol=0, atol=2e-6)
    torch.testing.assert_close(
        got.loss.flatten().double() / size, want.losses / size, rtol=0, atol=1e-6
    )
    assert torch.equal(got.correct.flatten(), want.correct)

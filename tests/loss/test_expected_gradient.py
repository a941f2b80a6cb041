"""grad_in_forward in place overwrites the logits in forward. The tests take expected gradients that
backward cannot rescale to another one."""

import pytest
import torch
from backends import ON_CPU, using
from cases import DTYPES

import fused_sft_loss as fsl
from fused_sft_loss.backends import selection

ONE_READ = [name for name in ON_CPU if name.partition("-")[0] in selection.ONE_READ]
if not ONE_READ:
    pytest.skip("neither native kernels nor the SIMT shim here", allow_module_level=True)

EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # bound of one rounding


def gradient(logits, labels, mask, upstream, backend, **options):
    leaf = logits.clone().requires_grad_()
    loss = fsl.sft_loss(
        leaf * 1, labels, mask, shift=False, reduction="sum", backend=backend, **options
    )
    loss.backward(torch.tensor(upstream))
    return leaf.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("expected", [0.0, 1e-45, 1e-30, -1e-20, 3e38, torch.inf, torch.nan])
@pytest.mark.parametrize("name", ONE_READ)
def test_in_place_any_other_gradient_is_right(name, expected, dtype):
    """0, subnormal numbers and infinities cannot be rescaled: such rows are stored for 1."""
    logits, labels = (torch.randn(1, 3, 1003) * 3).to(dtype), torch.randint(0, 1003, (1, 3))
    mask = torch.tensor([[1.0, 0.0, 0.5]])
    in_place = {"inplace_backward": True, "grad_in_forward": torch.tensor(expected)}
    with using(name) as backend:
        for upstream in (0.0, 0.75, -3.0, 1e-3):
            want = gradient(logits, labels, mask, upstream, backend)
            got = gradient(logits, labels, mask, upstream, backend, **in_place)
            assert want.isfinite().all() and bool(want.count_nonzero()) == bool(upstream)
            # Rounded when stored (subnormal numbers of fp16 to 2^-24) and again when rescaled.
            rtol = 2 * EPS[dtype] + 2**-22
            atol = 2**-24 * (1 + abs(upstream)) if dtype == torch.float16 else 0.0
            torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("weight", [1e-45, 1e-30])
@pytest.mark.parametrize("name", ONE_READ)
def test_in_place_a_weight_that_makes_the_expected_gradient_vanish(name, weight):
    """A row's factor is its weight times the gradient. 1e15 times 1e-30 must not be lost."""
    logits, labels = torch.randn(1, 2, 1003), torch.randint(0, 1003, (1, 2))
    mask = torch.tensor([[weight, 1.0]])
    in_place = {"inplace_backward": True, "grad_in_forward": True}
    with using(name) as backend:
        want = gradient(logits, labels, mask, 1e15, backend)
        got = gradient(logits, labels, mask, 1e15, backend, **in_place)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize("name", ONE_READ)
def test_in_place_the_usual_expected_gradients_are_stored_for_themselves(name):
    """A mean over a million tokens or a loss scale: backward returns the stored gradient as is."""
    logits, labels = torch.randn(1, 2, 1003), torch.randint(0, 1003, (1, 2))
    with using(name) as backend:
        for expected in (1e-6, 1.0, 2.0**16, 2.0**24):
            leaf = logits.clone().requires_grad_()
            memory = leaf * 1
            loss = fsl.sft_loss(
                memory, labels, shift=False, reduction="sum", backend=backend,
                inplace_backward=True, grad_in_forward=expected,
            )  # fmt: skip
            stored = memory.detach().clone()
            loss.backward(torch.tensor(expected))
            assert torch.equal(leaf.grad, stored) and stored.count_nonzero()

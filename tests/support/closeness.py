"""Tolerances against the float64 oracle, and the number of hypothesis examples."""

import os

import torch
from hypothesis import HealthCheck, settings

#: `python -m bench gpu` asks for fewer where its ten minutes have only one process for tests.
PRODUCT = settings(
    max_examples=int(os.environ.get("FSL_EXAMPLES", "120")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def assert_losses(got, want):
    # The error is a rounding error of fp32 numbers as large as lse: lse - z_y inherits it.
    size = 1 + want.losses.abs() + want.weight * want.lse.abs()
    torch.testing.assert_close(got.flatten().double() / size, want.losses / size, rtol=0, atol=1e-6)
    assert (got.flatten()[want.weight == 0] == 0).all()


def assert_grad(got, want, dtype, largest):
    """fp32: within 2e-6 of the largest term. 16 bits: within one rounding more.

    The terms p and 1 of p - onehot are as large as `largest`, weight * upstream * logit_scale.
    """
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    smallest = 2**-24 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(
        got.double(), want, rtol=rounding, atol=2e-6 * largest + smallest, equal_nan=True
    )

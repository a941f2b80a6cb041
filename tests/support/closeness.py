"""How close a result must be to the float64 oracle, and how many examples hypothesis draws."""

import torch
from hypothesis import HealthCheck, settings

PRODUCT = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def assert_losses(got, want):
    # Errors are those of fp32 numbers of lse's size, which a difference such as lse - z_y inherits.
    size = 1 + want.losses.abs() + want.weight * want.lse.abs()
    torch.testing.assert_close(got.flatten().double() / size, want.losses / size, rtol=0, atol=1e-6)
    assert (got.flatten()[want.weight == 0] == 0).all()


def assert_grad(got, want, dtype, scale):
    """Within 2e-6 of the largest term in fp32, within one rounding beyond that in 16 bits.

    The terms p and 1 of p - onehot are as large as `scale`, weight * upstream * logit_scale.
    """
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    smallest = 2**-24 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(
        got.double(), want, rtol=rounding, atol=2e-6 * scale + smallest, equal_nan=True
    )

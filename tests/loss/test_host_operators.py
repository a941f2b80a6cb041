"""Promise: apart from its kernels, a call runs no operator that computes."""

import pytest
import torch
from backends import ON_SHIM, using

import fused_sft_loss as fsl
from fused_sft_loss.backends import selection

#: autograd's backward starts with a gradient of 1.
OF_BACKWARD = {"ones_like", "fill_"}
#: Operators that allocate or view a tensor. On a GPU none of them launches a kernel.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "view", "unsqueeze", "transpose"}
FREE |= {"detach", "expand", "as_strided", *OF_BACKWARD}
FREE |= {"to"}  # with nothing to convert; a conversion would also run _to_copy
COMPILED = [*(["cpu"] if selection.reason_against("cpu", "cpu") is None else []), *ON_SHIM]


def operators(step):
    """Names of the aten operators that `step` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    names = (event.name for event in profile.events())
    return [name.removeprefix("aten::") for name in names if name.startswith("aten::")]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"inplace_backward": True}], ids=["plain", "in place"])
@pytest.mark.parametrize("name", COMPILED)
def test_no_operator_computes_beside_the_kernels(name, options, reduction, monkeypatch):
    if name != "cpu":  # as on an accelerator
        monkeypatch.setattr("fused_sft_loss.scoring.may_synchronise", lambda tensor: False)
    logits = torch.randn(2, 4, 50, requires_grad=True) * 1.0
    labels, mask = torch.randint(0, 50, (2, 4)), torch.ones(2, 4)
    with using(name) as backend:

        def step():
            loss = fsl.sft_loss(
                logits, labels, mask, reduction=reduction, backend=backend, **options
            )
            torch.autograd.grad(loss, logits)

        ran = operators(step)
    assert set(ran) <= FREE, sorted(set(ran) - FREE)


def test_the_count_can_fail():
    assert "mul" in operators(lambda: torch.ones(2) * 2)

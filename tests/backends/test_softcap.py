"""The softcap of every backend that runs on a CPU, against float64 over the whole range of fp32."""

import re
from pathlib import Path

import pytest
import torch
from backends import ON_CPU, using
from capped import CAPS, assert_capped, logits_of_every_size

from fused_sft_loss.backends import selection
from fused_sft_loss.rowmath import MOST_SMALL_CAP, RowMath

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("name", ON_CPU)
def test_softcap_of_every_size_of_logit(name, cap, scale):
    """The relative error is that of a few fp32 roundings, also where tanh is nearly its argument.
    Small caps on a GPU may be cap * 2^-21 off."""
    gpu = name.endswith("simt")
    x = logits_of_every_size(cap, 400 if gpu else 50_000)
    math = RowMath(0, 1, softcap=cap, logit_scale=scale)
    target, weight = torch.zeros(len(x), dtype=torch.int64), torch.ones(len(x))
    with using(name) as backend:
        kernels = selection.load(backend)
        stats = kernels.row_stats(x.view(1, -1, 1), target, weight, math, 3)
    short = gpu and cap <= MOST_SMALL_CAP
    assert_capped(stats[:, 2], x, math, absolute=cap * 2.0**-21 if short else 0.0)


def test_the_largest_small_cap_is_the_same_in_both_languages():
    text = (ROOT / "csrc/gpu/row_math.cuh").read_text(encoding="utf-8")
    (found,) = re.findall(r"kMostSmallCap = ([\d.]+);", text)
    assert float(found) == MOST_SMALL_CAP

"""The compiled modules take each record as a tuple of its fields, no more and no fewer."""

import pytest
import torch
from backends import ON_CPU

from fused_sft_loss.backends import arguments, selection
from fused_sft_loss.backends.contract import EntropyGrad, RowFactor
from fused_sft_loss.rowmath import RowMath
from fused_sft_loss.scoring import Scoring
from fused_sft_loss.targets import Targets

NATIVE = [name for name in ON_CPU if name.startswith("cpu-")]
pytestmark = pytest.mark.skipif(not NATIVE, reason="the native module is not built")

RECORDS = ("TargetsArgs", "Tensor3", "RowMath", "Gathered", "RowFactor", "EntropyGrad")


def calls():
    """Tensors, and {record: (function of the module, its arguments, the record's index there)}."""
    module = selection.load("cpu")._cpu
    labels = torch.zeros(1, 2, dtype=torch.int64)
    logits, stats, scale, *vectors = kept = [torch.zeros(1, 2, 6) for _ in range(6)]
    kept += (found := Targets.empty(labels))
    target, normalizer, result = (vector.data_ptr() for vector in vectors)
    rows, math = arguments.rows(logits), tuple(RowMath(0, 6))
    statistics = rows, math, target, normalizer, 3, result, 0, 1
    factor = arguments.row_factor(RowFactor(scale.view(-1)))
    entropy = arguments.entropy_grad(EntropyGrad(scale.view(-1), scale.view(-1)))
    gradient = rows, rows, math, target, normalizer, factor, 0, 0, entropy, 1
    return (labels, *kept), {
        "TargetsArgs": (
            module.row_targets,
            (arguments.targets(Scoring(labels, None, None, True, -100), 6, found),),
            0,
        ),
        "Tensor3": (module.row_stats, statistics, 0),
        "RowMath": (module.row_stats, statistics, 1),
        "Gathered": (
            module.merge,
            (arguments.gathered(stats), math, target, target, result, normalizer, 0),
            0,
        ),
        "RowFactor": (module.row_grad, gradient, 5),
        "EntropyGrad": (module.row_grad, gradient, 8),
    }


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_of_another_length_is_refused(record):
    """The module would read fields of another record, or beyond the tuple."""
    _alive, of = calls()
    function, given, at = of[record]
    function(*given)
    for wrong in (given[at][:-1], (*given[at], 0), list(given[at])):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            function(*given[:at], wrong, *given[at + 1 :])

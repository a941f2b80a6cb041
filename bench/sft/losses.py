"""The losses that train: their names, their titles in tables and pictures, how near they are."""

import math

LINEAR = "linear"  # computed in the output layer; the model returns no logits
TITLES = {"reference": "reference", "ours": "ours", LINEAR: "ours, no logits"}

# `bench agreement` compares them with two further runs of the reference.
IN_FP32 = "fp32"  # weights, activations and logits in fp32
REVERSED = "reversed"  # the rows of a batch in reverse order: the same sums in another order
EVERY_TITLE = {
    IN_FP32: "reference, fp32 model",
    REVERSED: "reference, rows reversed",
    **TITLES,
}

#: Relative, at step 1: the weights are the same, so only the rounding of sums may differ, and for a
#: run without logits that of logits, which it does not round to bf16 on some CPUs.
SAME_WEIGHTS = {"reference": 1e-5, "ours": 1e-5, "linear": 1e-3}
SAME_RUN = 1e-2  # relative: later, gradients rounded to bf16 make the weights differ


def disagreement(losses):
    """How the losses {run: its loss in each step} differ by more than rounding explains; or None.

    They may be of any number of steps, and of one run.
    """
    base, *others = losses.values()
    if not others or not base:
        return None
    names = list(losses)[1:]
    apart = [[abs(one / loss - 1) for one, loss in zip(run, base, strict=True)] for run in others]
    firsts = {name: run[0] for name, run in zip(names, apart, strict=True)}
    worst = max(sum(apart, []), key=lambda far: (math.isnan(far), far))  # max alone loses a NaN
    if all(first <= SAME_WEIGHTS[name] for name, first in firsts.items()) and worst <= SAME_RUN:
        return None
    allowed = {name: SAME_WEIGHTS[name] for name in names}
    return (
        f"the losses disagree: expected a relative difference of at most {allowed} at step "
        f"1 and {SAME_RUN:g} later, got {firsts} and {worst:.1e}"
    )

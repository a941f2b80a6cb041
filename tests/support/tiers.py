"""Which parameters of a test `make test` has; `make check` runs the others, marked `long`."""

import pytest


def sampled(values, sample=("sm_90", "gfx942")):
    """Parameters: make test has the sample, make check the others."""
    return [v if v in sample else pytest.param(v, marks=pytest.mark.long) for v in values]


def sampled_runs(runs, in_sample):
    """The same for tuples of parameters: those that `in_sample` accepts are the sample."""
    named = [(run, "-".join(map(str, run))) for run in runs]
    return [
        pytest.param(*run, id=name, marks=() if in_sample(run) else pytest.mark.long)
        for run, name in named
    ]

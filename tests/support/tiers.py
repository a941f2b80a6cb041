"""Divide a test's parameters: `make test` runs a sample, `make check` the rest (marked `long`)."""

import pytest


def sampled(values, sample=("sm_90", "gfx942")):
    """Parameters. Values in `sample` run in make test, the others in make check."""
    return [v if v in sample else pytest.param(v, marks=pytest.mark.long) for v in values]


def sampled_runs(runs, in_sample):
    """The same for tuples of parameters; `in_sample` selects the sample."""
    named = [(run, "-".join(map(str, run))) for run in runs]
    return [
        pytest.param(*run, id=name, marks=() if in_sample(run) else pytest.mark.long)
        for run, name in named
    ]

"""A pytest plugin that runs the promises' tests on the Triton kernels in Triton's interpreter.

    PYTHONPATH=tests/gpu:tests/support TRITON_INTERPRET=1 \\
        python -m pytest -p triton_interpreter tests/loss/test_bugs_of_peers.py

Triton decides at import whether it compiles or interprets kernels, so each run needs a separate
process. `test_triton_interpreted.py` starts them.
"""

import os
from itertools import groupby
from pathlib import Path
from random import Random

import backends
import numpy as np
from hypothesis import settings

# A call takes between 0.1 and 2 seconds here.
EXAMPLES = 8  # per hypothesis test; `triton_options.py` draws its own
VARIANTS = 18  # per parametrised promise test, drawn at random with a fixed seed


if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("expected TRITON_INTERPRET=1 in the environment before Python starts")

backends.ON_CPU[:] = ["triton"]  # at import, because the fixtures of conftest.py copy the list


def pytest_addoption(parser):
    parser.addoption("--sample", type=int, help="draw so many variants and examples of every test")


def pytest_configure():
    patch_once_per_launch()
    np.seterr(all="ignore")  # lanes without a row take the log of 0, as on a GPU


def pytest_collection_modifyitems(config, items):
    left_out, sample = set(), config.getoption("sample")
    for name, variants in groupby(items, lambda item: item.nodeid.partition("[")[0]):
        variants = list(variants)
        promises = Path(name.partition("::")[0]).name.startswith("test_")
        most = sample or (VARIANTS if promises else len(variants))
        if len(variants) > most:
            left_out.update(Random(0).sample(variants, len(variants) - most))
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        test = getattr(item, "obj", None)
        chosen = getattr(test, "_hypothesis_internal_use_settings", None)
        if chosen is not None:
            fewer = settings(chosen, max_examples=min(sample or EXAMPLES, chosen.max_examples))
            test._hypothesis_internal_use_settings = fewer


def patch_once_per_launch():
    """Patch triton.language once per launch. The interpreter does it at every call of a device
    function, which takes 2 ms."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()
    languages = {id(interpreter.tl), id(interpreter.tl.core)}

    class Scope:
        def __init__(self, scope):
            self.scope = scope

        def restore(self):  # called once, at the end of a launch
            patched.clear()
            self.scope.restore()

    def patch_unless_done(fn):
        modules = frozenset(map(id, fn.__globals__.values())) & languages
        if modules not in patched:
            patched.add(modules)
            return Scope(patch(fn))

    interpreter._patch_lang = patch_unless_done

"""The Triton kernels, executed by Triton's interpreter: the promises' own tests, and some more.

In processes of their own, see `triton_interpreter.py`. To run one by hand:

    PYTHONPATH=tests/gpu:tests/support TRITON_INTERPRET=1 \\
        python -m pytest -p triton_interpreter tests/gpu/triton_rows.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
EXTREMES = (
    "maxima_of_any_finite_size",
    "metrics_of_maxima_of_any_finite_size",
    "shards_of_any_finite_size",
    "probabilities_of_ties_sum_to_1",
    "loss_of_sure_tokens",
)
OPCHECK = "loss/test_compile.py::test_opcheck"
LOGITS = "loss/test_extreme_logits.py"
RUNS = {  # name -> (what is run, how many tests there are at least)
    "options": ("gpu/triton_options.py loss/test_against_oracle.py", 140),
    "traps": ("loss/test_bugs_of_peers.py loss/test_bugs_of_peers_with_masks.py", 70),
    "extremes": (" ".join(f"{LOGITS}::test_{name}" for name in EXTREMES), 13),
    "sharded": ("loss/test_sharded.py", 5),
    "others": (f"loss/test_module_and_metrics.py loss/test_determinism.py {OPCHECK}", 9),
    "logprobs": ("loss/test_token_logprobs.py loss/test_token_logprobs_sharded.py", 40),
    "linear": ("linear/test_linear_against_oracle.py", 25),
    "rows": ("gpu/triton_rows.py gpu/triton_vectors.py", 140),
}


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_in_the_interpreter(name):
    interpret(*RUNS[name])


def test_one_variant_of_every_test_in_the_interpreter():
    """The sample of the runs above that make test has: one process, and not the slowest test."""
    sampled = (RUNS[name][0] for name in ("options", "logprobs", "linear", "rows"))
    interpret(" ".join(sampled), 30, "--sample", "1", "-k", "not test_ignored_rows_never_written")


def interpret(what, at_least, *options):
    command = [sys.executable, "-m", "pytest", "-p", "triton_interpreter", "-q"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", *options]
    command += [str(ROOT / "tests" / part) for part in what.split()]
    for ranks in (1, 4):  # 2 is left: each rank is an interpreter
        left_out = f"tests/loss/test_sharded.py::test_sharded_equals_unsharded[{ranks}]"
        command += ["--deselect", left_out]
    paths = [str(HERE), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = int(done.stdout.rpartition(" passed")[0].split()[-1])
    assert passed >= at_least, done.stdout[-2000:]

"""Promise: no global default (dtype, device, autocast, determinism) leaks into a result or buffer.

Each setting runs in a separate process, because a buffer of the wrong dtype corrupts the heap.
"""

import ast
import os
import random
import subprocess
import sys
from pathlib import Path

import global_defaults
import pytest
import torch
from cases import DTYPES, LAYOUTS, build
from tiers import sampled

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests/support"
REFERENCE = "as it comes"


def some_cases():
    """Cases with different options, layouts, dtypes and masks."""
    choose = random.Random(13).choice
    for seed in range(8):
        options = {
            "shift": choose([True, True, False]),
            "label_smoothing": choose([0.0, 0.1]),
            "z_loss": choose([0.0, 1e-3]),
            "softcap": choose([None, 5.0]),
            "logit_scale": choose([1.0, 2.5]),
            "vocab_size": choose([None, 33]),
            "ignore_index": choose([-100, 0]),
        }
        if options["shift"] and seed % 2:
            options["cu_seqlens"] = torch.tensor([0, 3, 7], dtype=torch.int32)
        mask = choose(["none", "none", "bool", "int", "half", "float", "empty"])
        yield build(LAYOUTS[seed % 6], DTYPES[seed % 3], 2, 6, 40, seed, mask, options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a process under a setting; returns its results by (case, backend)."""
    folder = tmp_path_factory.mktemp("defaults")
    torch.save(list(some_cases()), folder / "cases")
    known = {}

    def run(setting):
        if setting not in known:
            out = folder / setting.replace(" ", "_")
            command = [sys.executable, SUPPORT / "global_defaults.py", setting]
            path = os.pathsep.join([str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
            done = subprocess.run(
                [*command, folder / "cases", out], env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-2000:]}"
            known[setting] = torch.load(out)
        return known[setting]

    return run


SETTINGS = [name for name in global_defaults.SETTINGS if name != REFERENCE]


@pytest.mark.parametrize("setting", sampled(SETTINGS, ("bfloat16",)))
def test_trap_a_global_default_changes_no_bit(run, setting):
    want, got = run(REFERENCE), run(setting)
    assert len(want) >= 16 and got.keys() == want.keys()
    for key, tensors in want.items():
        assert len(got[key]) == len(tensors) > 20
        for number, (a, b) in enumerate(zip(got[key], tensors, strict=True)):
            same = a.dtype == b.dtype and a.device == b.device
            where = f"case {key[0]}, backend {key[1]}, result {number}: {a.dtype} {a.device}"
            assert same and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), where


FACTORIES = {"empty", "zeros", "ones", "full", "tensor", "arange", "as_tensor", "scalar_tensor"}
FACTORIES |= {"rand", "randn", "linspace", "eye"}


def unnamed(source):
    """Lines where torch makes a tensor without both dtype and device, or where `torch.where` picks
    between two numbers, which gives a tensor of the default dtype."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        function = ast.unparse(call.func)
        told = {keyword.arg for keyword in call.keywords}
        if function in {f"torch.{name}" for name in FACTORIES} and not {"dtype", "device"} <= told:
            yield call.lineno
        if function == "torch.where" and all(map(is_number, call.args[1:])):
            yield call.lineno


def is_number(node):
    return isinstance(node, ast.Constant) or ast.unparse(node) in ("torch.nan", "torch.inf")


def test_every_allocation_names_its_dtype_and_device():
    root, found = ROOT, []
    files = [*root.glob("fused_sft_loss/**/*.py"), *root.glob("triton_kernels/*.py")]
    assert len(files) > 30
    for file in files:
        found += [f"{file.relative_to(root)}:{line}" for line in unnamed(file.read_text())]
    assert found == []
    for source in ("torch.empty(3, 4)", "torch.where(a, torch.nan, 0.0)", "torch.arange(3)"):
        assert list(unnamed(source)) == [1]

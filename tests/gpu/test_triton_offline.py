"""Every Triton kernel compiles for six GPUs, without the GPUs, with its real launch arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.without_gpu.chips import TRITON

pytest.importorskip("triton")

COMPILE = """
import sys
from bench.without_gpu import triton_offline as offline

chip = offline.CHIPS[sys.argv[1]]
for variant in offline.variants(chip, options=False):
    if variant.shape is None or variant.shape.columns is None:
        kernel = offline.compile(variant.launch, chip)
        code = kernel.asm.get("cubin") or kernel.asm["hsaco"]
        print(variant.name, "|", len(code), kernel.metadata.shared)
"""

KERNELS = {"row_stats", "fold_segments", "row_grad", "merge", "reduce", "row_targets"}
DTYPES = {"torch.bfloat16", "torch.float16", "torch.float32"}


@pytest.mark.long  # make test audits one of them, sm_90 (test_codegen.py)
@pytest.mark.parametrize("chip", TRITON)
def test_compiles_for(chip):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, chip],
        cwd=Path(__file__).parents[2],
        env={**environment, "TRITON_DEFAULT_FP_FUSION": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    names = [line.partition(" | ")[0].split() for line in done.stdout.splitlines()]
    assert {name[0] for name in names} == KERNELS
    for kernel in ("row_stats", "row_grad"):
        assert {name[1] for name in names if name[0] == kernel} == DTYPES
    assert all(int(line.split()[-1]) <= 64 * 1024 for line in done.stdout.splitlines())

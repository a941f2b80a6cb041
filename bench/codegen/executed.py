"""Passes of a training step as executed: their PTX in the interpreter that the tests keep.

Counted, where the other tables read what a loop would do; both should say the same.
"""

import sys
from pathlib import Path

import torch

from ..errors import UserError

TESTS = Path(__file__).parent.parent.parent / "tests"
PASSES = ("statistics", "gradient", "one read")
ROWS, COLUMNS = 2, 128256


def records(backends, targets, dtypes) -> list[dict]:
    """Per element of the logits: bytes, ex2, shuffles and PTX instructions of each pass."""
    if not (TESTS / "ptx").is_dir():
        raise UserError(f"--executed needs the PTX interpreter of a checkout, none in {TESTS}")
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    return [
        _record(backend, target, dtype, name, counts)
        for target in targets
        for dtype in dtypes
        for backend in backends
        if (run := _run(backend, target, dtype))
        for name, counts in run.counts.items()
        if name in PASSES
    ]


def _run(backend: str, target: str, dtype: str):
    torch.manual_seed(0)
    logits = torch.randn(1, ROWS, COLUMNS).to(getattr(torch, dtype))
    labels = torch.tensor([[5, 9]])
    if backend == "triton" and target.startswith("sm_"):
        from ptx_launches import Run

        return Run(target, logits, labels, shift=False)()
    if backend == "cuda" and target.startswith("sm_"):
        import cuda_launches

        if target == cuda_launches.TARGET:
            # One block a row, however wide: the interpreter has no clusters, and no limit.
            return cuda_launches.Run(logits, labels, shift=False)().one_read()
    return None


def _record(backend, target, dtype, name, counts) -> dict:
    elements = ROWS * COLUMNS
    return {
        "target": target,
        "backend": backend,
        "dtype": dtype,
        "pass": name,
        "loaded": counts.loaded["logits"] / elements,
        "stored": counts.stored["grad"] / elements,
        "exps": counts.exps / elements,
        "shuffles": 32 * counts.instructions["shfl"] / elements,
        "instructions": 32 * counts.warp_instructions / elements,
    }

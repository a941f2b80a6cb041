"""Passes of a training step as executed: their PTX in the interpreter of ../ptx.

Counted, where the other tables read what a loop would do; both should say the same.
"""

import torch

PASSES = ("statistics", "gradient", "one read")
ROWS, COLUMNS = 2, 128256


def records(backends, targets, dtypes) -> list[dict]:
    """Per element of the logits: bytes, ex2, shuffles and PTX instructions of each pass."""
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
        from ..launches import triton

        return triton.Run(target, logits, labels, shift=False)()
    if backend == "cuda" and target.startswith("sm_"):
        from ..launches import cuda

        if target == cuda.TARGET:
            # One block a row, however wide: the interpreter has no clusters, and no limit.
            return cuda.Run(logits, labels, shift=False)().one_read()
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

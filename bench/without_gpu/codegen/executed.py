"""Count the passes of a training step by executing their PTX in the interpreter of ../ptx.

The other tables derive counts from the text of a loop. Both should agree.
"""

import torch

PASSES = ("statistics", "gradient", "one read")
ROWS, COLUMNS = 2, 128256


def records(backends, targets, dtypes) -> list[dict]:
    """Bytes, ex2, shuffles and PTX instructions of each pass, per element of the logits."""
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
            # One block per row of any width: the interpreter has no clusters and no memory limit.
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

"""Compile every launch of Triton's launch table and describe each compiled kernel once."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ...errors import UserError
from . import compiled_cache, record

#: The pass of each kernel.
PASSES = {
    "row_stats_kernel": "statistics",
    "row_grad_kernel": "gradient",
    "row_stats_grad_kernel": "one read",
    "row_rescale_kernel": "rescaling",
}


@dataclass(frozen=True)
class Work:
    """One launch to compile; `launch` is a triton_kernels.launch.Launch."""

    target: str
    name: str
    columns: int | None  # serves V_local up to this; None: any
    launch: object
    use: str | None = None  # in the launch table; None: a kernel over vectors of N rows

    @property
    def kernel(self) -> str:
        return self.launch.kernel.__name__.removesuffix("_kernel")

    @property
    def dtype(self) -> str | None:
        logits = self.launch.arguments.get("logits", self.launch.arguments.get("X_ptr"))
        return None if logits is None else str(logits.dtype).removeprefix("torch.")

    @property
    def element_bytes(self) -> int | None:
        return record.ELEMENT_BYTES.get(self.dtype)


@cache
def ours(target: str, options: bool) -> list[Work]:
    """Launches of every line of a target's table; see triton_offline.variants.

    Without `options`: the launches of plain training, plus all launches of any line that plain
    training does not reach.
    """
    from .. import triton_offline

    chip = triton_offline.CHIPS[target]
    variants = list(triton_offline.variants(chip, options))
    if not options:
        reached = {_place(v) for v in variants}
        variants += [v for v in triton_offline.variants(chip, True) if _place(v) not in reached]
    return [
        Work(
            target,
            v.name.replace("torch.", ""),
            v.shape and v.shape.columns,
            v.launch,
            v.use,
        )
        for v in variants
    ]


def _place(variant):
    """The line of the launch table and its kernel."""
    return variant.shape, variant.launch.kernel.__name__


def records(
    source: Callable[[str], list[Work]],
    targets: list[str],
    keep: Callable[[Work], bool],
    folder: Path,
    jobs: int,
) -> list[dict]:
    """Records of the launches of `source` that pass `keep`, one per distinct compiled kernel.

    `folder` caches compiled code and records under hashes of their contents.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError(
            "TRITON_INTERPRET=1 makes Triton interpret kernels; unset it to compile them"
        )
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    # Triton 3.9's default for kernels that do not set it; all of ours do.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    tasks = [
        (source, target, index, folder)
        for target in targets
        for index, work in enumerate(source(target))
        if keep(work)
    ]
    if jobs > 1 and len(tasks) > 1:
        # Fork, so that Triton and torch are imported once. No thread has started yet.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            made = list(pool.map(_one, tasks, chunksize=4))
    else:
        made = [_one(task) for task in tasks]
    return _once_each(made)


def _one(task) -> dict:
    source, target, index, folder = task
    work = source(target)[index]
    from .. import triton_offline

    compiled = triton_offline.compile(work.launch, triton_offline.CHIPS[target])
    arguments = work.launch.arguments
    return {
        "backend": "triton",
        "kernel": work.kernel,
        "name": work.name,
        "use": work.use,
        "columns": work.columns,
        "dtype": work.dtype,
        "element_bytes": work.element_bytes,
        "pass": PASSES.get(work.launch.kernel.__name__),
        "runs": arguments.get("RUNS"),
        "aligned": arguments.get("ALIGNED", True),
        "wide": arguments.get("ALIGNED", True),  # Triton loads unaligned rows element by element
        "hash": compiled.hash,
        **_described(compiled, work, folder / "records"),
        "threads_limit": 1024,
    }


def _described(compiled, work: Work, folder: Path) -> dict:
    code = compiled.asm.get("cubin") or compiled.asm["amdgcn"].encode()
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    threads = warps * (64 if work.target.startswith("gfx") else 32)

    def make():
        (kernel,) = record.kernels(code, work.target).values()
        # NVIDIA: dynamic shared memory, only in the metadata. AMD: in both places.
        shared_bytes = max(shared, kernel.resources["shared_bytes"])
        kernel = replace(kernel, resources={**kernel.resources, "shared_bytes": shared_bytes})
        return record.make(kernel, work.target, threads, work.element_bytes)

    about = (work.target, work.element_bytes, threads, shared)
    return compiled_cache.described(folder, code, about, make)


def _once_each(made: list[dict]) -> list[dict]:
    """Merge launches of one line that compile to the same code; the first one's name stays."""
    unique: dict[tuple, dict] = {}
    for item in made:
        key = (item["target"], item["kernel"], item["columns"], item["hash"])
        unique.setdefault(key, {**item, "launches": 0})["launches"] += 1
    return list(unique.values())

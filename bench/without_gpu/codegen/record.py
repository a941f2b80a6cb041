"""Make a JSON-able record of one compiled kernel."""

from ..chips import CHIPS, resident_threads
from . import amdgcn, sass
from .loops import Shifted, hot_loops, one_read_from_registers
from .machine_code import Compiled
from .predict import predict

#: Size of a logit.
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def kernels(code: bytes, target: str) -> dict[str, Compiled]:
    """The kernels of a cubin or an AMDGCN listing, by mangled name."""
    return sass.kernels(code, target) if target.startswith("sm_") else amdgcn.kernels(code.decode())


def make(
    compiled: Compiled,
    target: str,
    threads: int,
    element_bytes: int | None,
    shifted: Shifted | None = None,
    in_registers: bool = False,
) -> dict:
    """Resources and hot loops of a kernel launched with blocks of `threads`.

    `element_bytes` is the size of a logit; None for kernels that read no logits. `in_registers`:
    the kernel holds a row in registers and handles it in straight-line code.
    """
    limits = CHIPS[target]
    code, resources = compiled.code, compiled.resources
    resident, limited_by = resident_threads(
        limits, threads, resources["registers"], resources["shared_bytes"]
    )
    loops = hot_loops(code, element_bytes, shifted) if element_bytes else []
    if element_bytes and in_registers and (held := one_read_from_registers(code, element_bytes)):
        loops.append(held)
    return {
        "target": target,
        "threads": threads,
        **resources,
        "shared_bytes_limit": limits.shared_bytes_of_block,
        "local_accesses": _local_accesses(code),
        "exps": sum(i.exp for i in code.instructions),
        "instructions": len(code.instructions),
        "resident_threads": resident,
        "occupancy": resident / limits.threads,
        "occupancy_limit": limited_by,
        "loops": {
            loop.purpose: {
                **loop.as_dict(),
                "in_flight": resident * loop.loads_at_once * max(loop.load_bytes, default=0),
                "predicted": predict(limits, loop.as_dict()),
            }
            for loop in loops
        },
    }


def _local_accesses(code) -> int:
    return sum(bool(i.access) and i.access.space == "local" for i in code.instructions)

"""One compiled kernel as a JSON-able record."""

from . import amdgcn, sass
from .chips import CHIPS, resident_threads
from .loops import hot_loops
from .predict import predict


def make(compiled, target: str, element_bytes: int | None) -> dict:
    """Resources and hot loops of Triton's CompiledKernel.

    `element_bytes` is the size of a logit; None for kernels that read none.
    """
    amd = target.startswith("gfx")
    resources, code = _amd(compiled) if amd else _nvidia(compiled)
    limits = CHIPS[target]
    threads = compiled.metadata.num_warps * (64 if amd else 32)
    resident, limited_by = resident_threads(
        limits, threads, resources["registers"], resources["shared_bytes"]
    )
    loops = hot_loops(code, element_bytes) if element_bytes else []
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
                "in_flight": resident * loop.loaded * loop.elements,
                "predicted": predict(limits, loop.as_dict()),
            }
            for loop in loops
        },
    }


def _local_accesses(code) -> int:
    return sum(bool(i.access) and i.access.space == "local" for i in code.instructions)


def _nvidia(compiled) -> tuple[dict, object]:
    cubin = compiled.asm["cubin"]
    found = sass.resources(cubin)
    code = sass.parse(cubin)
    # Triton's shared memory is dynamic; what is static is the system's, from sm_90 on.
    return {
        "registers": found["REG"],
        "agprs": 0,
        "sgprs": 0,
        # A register that is spilled goes to the stack, in local memory; so does a local array.
        "spills": sum(
            bool(i.access) and i.access.space == "local" and i.access.store
            for i in code.instructions
        ),
        "scratch_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
    }, code


def _amd(compiled) -> tuple[dict, object]:
    text = compiled.asm["amdgcn"]
    found = amdgcn.resources(text)
    return {
        "registers": found["vgpr"],
        "agprs": found["agpr"],
        "sgprs": found["sgpr"],
        "spills": found["vgpr_spills"] + found["sgpr_spills"],
        "scratch_bytes": found["scratch"],
        "shared_bytes": max(found["shared"], compiled.metadata.shared),
    }, amdgcn.parse_text(text)

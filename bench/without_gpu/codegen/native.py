"""Records of the CUDA and HIP kernels, in the format of collect.py's records for Triton."""

from collections.abc import Callable
from pathlib import Path

from . import compiled_cache, record, toolchains
from .collect import PASSES
from .instances import SMALL_CAP, Instance, instance
from .launch_table import Line, launch_table, lines
from .loops import Shifted


def records(
    backend: str,
    targets: list[str],
    keep: Callable[[Instance], bool],
    folder: Path,
    jobs: int,
) -> tuple[list[dict], list[dict]]:
    """One record per kernel that passes `keep` and line of the launch table that launches it; and
    the targets without a compiler, with the reason."""
    targets = [target for target in targets if target in toolchains.TARGETS[backend]]
    toolchain = toolchains.find(backend)
    if not toolchain:
        reason = f"no compiler: {toolchains.INSTALL[backend]}"
        return [], [{"backend": backend, "target": target, "reason": reason} for target in targets]
    refusals = {target: toolchain.refusal(target) for target in targets}
    absent = [
        {"backend": backend, "target": target, "reason": reason}
        for target, reason in refusals.items()
        if reason
    ]
    codes = toolchain.compile([t for t in targets if not refusals[t]], folder, jobs)
    made = [
        {**about, "backend": backend, **measured}
        for target, files in codes.items()
        for code in files
        for about, measured in _described(target, code, keep, folder / "records")
    ]
    return made, absent


def _described(target: str, code: bytes, keep, folder: Path):
    def make():
        return {
            mangled: [_record(kernel, target, line, one) for line in _lines(target, kernel, one)]
            for mangled, kernel in record.kernels(code, target).items()
            for one in [instance(mangled)]
        }

    launches = compiled_cache.described(folder, code, (target, launch_table()), make)
    for mangled, made in launches.items():
        one = instance(mangled)
        if keep(one):
            for launch in made:
                yield _about(one, compiled_cache.digest(code, mangled.encode())), launch


def _record(kernel, target: str, line: Line, one: Instance) -> dict:
    in_registers = one.kernel == "row_stats_grad" and target.startswith("gfx")
    shifted = _shifted(target, one)
    return {
        "use": line.kernel,
        "columns": line.columns,
        **record.make(kernel, target, line.threads, one.element_bytes, shifted, in_registers),
    }


def _shifted(target: str, one: Instance) -> Shifted | None:
    """AMD loads 16 bytes from any address and shifts nothing; see kUnalignedAccess."""
    return (
        Shifted(2 if one.softcap == SMALL_CAP else 1)
        if one.shifted and target.startswith("sm_")
        else None
    )


def _lines(target: str, kernel, one: Instance) -> list[Line]:
    """Lines of the launch table. A kernel without lines gets one with its launch bound."""
    bound = kernel.resources["threads_limit"]
    return lines(target, one.kernel) or [Line(target, None, None, bound, 0, "")]


def _about(one: Instance, digest: str) -> dict:
    return {
        "kernel": one.kernel,
        "name": one.name,
        "dtype": one.dtype,
        "element_bytes": one.element_bytes,
        "pass": PASSES.get(f"{one.kernel}_kernel"),
        "aligned": not one.shifted,
        "wide": True,  # unaligned rows are shifted into place
        "hash": digest,
        "launches": 1,
    }

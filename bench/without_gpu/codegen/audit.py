"""Rules that every compiled kernel must pass; each violation says what was found instead."""

from .loops import HELD

#: The loops that each pass must have. One-read kernels also need the two-read loops, for the part
#: of a row that does not fit on chip.
PURPOSES = {
    "statistics": {"statistics"},
    "gradient": {"gradient", "zeros"},
    "one read": {"one read", "statistics", "gradient", "zeros"},
    "rescaling": {"rescaling", "zeros"},
}


def violations(record: dict) -> list[str]:
    """Rules that a record (see record.make) breaks; empty if it breaks none."""
    broken = []
    for key in ("spills", "scratch_bytes", "local_accesses"):
        if record[key]:
            broken.append(f"expected no {key.replace('_', ' ')}, got {record[key]}")
    if record["threads"] > record["threads_limit"]:
        broken.append(
            f"expected at most {record['threads_limit']} threads, got {record['threads']}"
        )
    if record["shared_bytes"] > record["shared_bytes_limit"]:
        broken.append(
            f"expected at most {record['shared_bytes_limit']} bytes of shared memory, "
            f"got {record['shared_bytes']}"
        )
    if record["resident_threads"] < record["threads"]:
        broken.append(f"expected a block to fit a unit; too many {record['occupancy_limit']}")
    if record["pass"]:
        broken += _loop_violations(record)
    return broken


def _loop_violations(record: dict) -> list[str]:
    purposes = PURPOSES[record["pass"]]
    if record["pass"] == "one read" and not record["target"].startswith("gfx"):
        purposes = purposes | set(HELD)
    missing = purposes - set(record["loops"])
    broken = [f"expected a hot loop for {purpose}, found none" for purpose in sorted(missing)]
    extra = set(record["loops"]) - purposes
    broken += [f"unexpected loop over the logits: {purpose}" for purpose in sorted(extra)]
    size = record["element_bytes"]
    for purpose, loop in record["loops"].items():
        if record["wide"]:
            for what in ("load", "store"):
                if any(width < 16 for width in loop[f"{what}_bytes"]):
                    broken.append(
                        f"expected {what}s of 16 bytes in the {purpose} loop, "
                        f"got {loop[f'{what}_bytes']}"
                    )
        for what, wanted in _traffic(purpose, size, record["aligned"]).items():
            if loop[what] != wanted:
                broken.append(
                    f"expected {wanted} bytes {what} per element in the {purpose} loop, "
                    f"got {loop[what]:g}"
                )
        for what in ("local", "generic"):
            if n := loop[f"{what}_accesses"]:
                broken.append(f"expected no {what} accesses in the {purpose} loop, got {n}")
    return broken


def _traffic(purpose: str, size: int, aligned: bool) -> dict[str, int]:
    return {
        "statistics": {"loaded": size, "stored": 0},
        "gradient": {"loaded": size, "stored": size},
        "zeros": {"loaded": 0, "stored": size},
        "rescaling": {"loaded": size, "stored": size},
        "one read": {"loaded": size, "stored": size},
        "bringing": {"loaded": size, "stored": 0},
        "held stats": {"loaded": 0, "stored": 0},
        # Loads the next row; rows at any address are not taken in turn.
        "held grad": {"loaded": size if aligned else 0, "stored": size},
    }[purpose]

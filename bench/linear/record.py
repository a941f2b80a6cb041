"""The record of a run.

    {"schema": 1, "finished": true, "machine": {...}, "settings": {...},
     "cases": [{the fields of Case, ..., "chunk_bytes",
                "products": {"dtype", "three_ms", "four_ms", "gflop_per_s"} or null}],
     "rows":  [{"case": index into cases, "provider", "title", "status", "reason", "check",
                "products": 3 or 4, "ms": {...}, "forward_ms", "backward_ms", "samples_ms",
                "x_products", "memory": {"forward", "full", "resident"}, "chunks"}]}

`x_products` is the time over that of the row's own number of bare products. `memory` is in bytes:
`forward` beyond the inputs, the others beyond inputs and gradients. Statuses: kernels/record.py.
"""

import statistics

import torch

from fused_sft_loss.linear.products import dtype_of_products

from ..kernels.record import SCHEMA, spread, total
from .products import NAME, seconds_of
from .providers import PROVIDERS

TIMED = ("ms", "forward_ms", "backward_ms", "samples_ms", "x_products")


def build(rows, machine, settings, device_type, finished):
    """The JSON-able record of a kernels.record.Rows."""
    cases = [
        _case(case, roof.get(NAME), device_type)
        for case, roof in zip(rows.cases, rows.roofs, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "finished": finished,
        "machine": machine,
        "settings": settings,
        "cases": cases,
        "rows": [_row(row, cases) for row in rows.rows.values()],
    }


def _case(case, samples, device_type):
    found = None
    if samples:
        three, four = (statistics.median(seconds_of(samples, count)) for count in (3, 4))
        dtype = dtype_of_products(torch.empty(0, dtype=case.torch_dtype, device=device_type))
        found = {
            "dtype": str(dtype).removeprefix("torch."),
            "three_ms": three * 1e3,
            "four_ms": four * 1e3,
            "gflop_per_s": 3 * case.operations / three / 1e9,
        }
    return {**case.record(), "chunk_bytes": case.chunk_bytes(device_type), "products": found}


def _row(row, cases):
    case = {} if row["case"] is None else cases[row["case"]]
    products = PROVIDERS[row["provider"]].products
    out = {key: value for key, value in row.items() if key not in ("seconds", "mode")}
    out |= {"products": products, "chunks": None, **dict.fromkeys(TIMED)}
    if row["memory"] and case["chunk_bytes"]:
        out["chunks"] = row["memory"]["full"] / case["chunk_bytes"]
    if not row["seconds"]:
        return out
    samples = total(row["seconds"])
    out |= spread(row["seconds"], samples)
    if case["products"]:
        bare = case["products"]["three_ms" if products == 3 else "four_ms"]
        out["x_products"] = out["ms"]["p50"] / bare
    return out

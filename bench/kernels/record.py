"""The record of a run, as JSON and CSV, and its changes since an older record.

    {"schema": 1, "finished": true, "machine": {...}, "settings": {...},
     "cases": [{the fields of Case, "rows", "scored_rows", "logits_bytes",
                "roof": {"copy_gb_per_s", "zero_gb_per_s"} or null}],
     "rows":  [{"case": index into cases, "provider", "title", "status", "reason", "check", ...}]}

A provider that can run none of the cases has one row. It has a reason, and null as its case.
status: "ok"; "wrong" (the check failed, so it was not timed), "unavailable", "OOM" and "failed",
each with a reason; "pending" if the run was interrupted or its --stop was over.
"""

import csv
import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path

from ..errors import UserError

SCHEMA = 1
STATUSES = ("ok", "wrong", "unavailable", "OOM", "failed", "pending")
CASE_KEY = (
    "model",
    "vocab",
    "columns",
    "tp",
    "nproc",
    "batch",
    "seq",
    "dtype",
    "scored",
    "softcap",
)


class Rows:
    """The results of every (case, provider) so far. The workers' messages fill them in."""

    def __init__(self, cases, mode):
        self.cases, self.mode = cases, mode
        self.roofs = [{} for _ in cases]
        self.rows = {}  # (index, name) -> dict

    def add_all(self, providers, device_type):
        """Add the rows of all providers. A row is pending if its provider can run."""
        for provider in providers:
            reasons = [provider.reason_against(case, device_type) for case in self.cases]
            if all(reasons):
                self.add(None, provider, reasons[0])
                continue
            for index, reason in enumerate(reasons):
                self.add(index, provider, reason)

    def add(self, index, provider, reason):
        different = self.mode != "full" and provider.one_read
        self.rows[index, provider.name] = {
            "case": index,
            "provider": provider.name,
            "title": provider.title + (" (gradient in forward)" if different else ""),
            "mode": self.mode,
            "status": "unavailable" if reason else "pending",
            "reason": reason,
            "check": None,
            "seconds": None,
            "memory": None,
        }

    def tell(self, index, name, what):
        """Store a message. Returns False if it does not finish a row: a roof, or a check."""
        if (index, name) not in self.rows:
            self.roofs[index][name] = what["seconds"]
            return False
        row = self.rows[index, name]
        if "seconds" in what:
            what = {**what, "status": "ok"}
        if "status" in what and row["seconds"] and what["status"] != "ok":
            what = {"reason": f"memory: {what['reason']}"}  # its times stay valid
        row.update(what)
        return "check" not in what

    def pending(self, index, name):
        return self.status(index, name) == "pending"

    def status(self, index, name):
        """The status of a row, or None if there is none: the provider can run no case."""
        row = self.rows.get((index, name))
        return row and row["status"]


def build(rows, machine, settings, finished):
    """The JSON-able record of a Rows."""
    return {
        "schema": SCHEMA,
        "finished": finished,
        "machine": machine,
        "settings": settings,
        "cases": [_case(*pair) for pair in zip(rows.cases, rows.roofs, strict=True)],
        "rows": [_row(row, rows) for row in rows.rows.values()],
    }


def _case(case, roof):
    bandwidth = {}
    for name, moved in (("copy", 2), ("zero", 1)):
        if name in roof:
            seconds = statistics.median(total(roof[name]))
            bandwidth[f"{name}_gb_per_s"] = moved * case.logits_bytes / seconds / 1e9
    sizes = {key: getattr(case, key) for key in ("rows", "scored_rows", "logits_bytes")}
    return {**asdict(case), **sizes, "roof": bandwidth or None}


def total(seconds):
    return [forward + backward for forward, backward in seconds]


def roof_seconds(case, roof, mode):
    """Seconds to move and zero the minimum bytes of a loss, at the bandwidth of copy and zero."""
    moved, zeroed = case.minimum_bytes(mode)
    return (moved / roof["copy_gb_per_s"] + zeroed / roof["zero_gb_per_s"]) / 1e9


def _row(row, rows):
    case = None if row["case"] is None else rows.cases[row["case"]]
    out = {key: value for key, value in row.items() if key != "seconds"}
    out |= dict.fromkeys(TIMED) | dict.fromkeys(("forward_x_logits", "full_x_logits"))
    if row["memory"]:
        for name in ("forward", "full"):
            out[f"{name}_x_logits"] = row["memory"][name] / case.logits_bytes
    if not row["seconds"]:
        return out
    samples = total(row["seconds"]) if row["mode"] == "full" else _part(row)
    p50 = statistics.median(samples)
    out |= {
        **spread(row["seconds"], samples),
        "tokens_per_s": case.rows / p50,
        "gb_per_s": sum(case.minimum_bytes(row["mode"])) / p50 / 1e9,
    }
    roof = _case(case, rows.roofs[row["case"]])["roof"]
    if roof:
        out["of_roof"] = roof_seconds(case, roof, row["mode"]) / p50
    reference = rows.rows.get((row["case"], "reference"))
    if reference and reference["seconds"]:
        them = total(reference["seconds"]) if row["mode"] == "full" else _part(reference)
        out["speedup"] = statistics.median(them) / p50
    return out


TIMED = ("ms", "forward_ms", "backward_ms", "samples_ms", "tokens_per_s", "gb_per_s")
TIMED += ("of_roof", "speedup")


def spread(seconds, samples):
    """Times of a row: `seconds` [(forward, backward)], and `samples` of what its mode measures."""
    return {
        "ms": {
            "p20": _quantile(samples, 0.2),
            "p50": statistics.median(samples) * 1e3,
            "p80": _quantile(samples, 0.8),
        },
        "forward_ms": statistics.median(forward for forward, _ in seconds) * 1e3,
        "backward_ms": statistics.median(backward for _, backward in seconds) * 1e3,
        "samples_ms": [round(one * 1e3, 4) for one in samples],
    }


def _part(row):
    return [pair[0 if row["mode"] == "fwd" else 1] for pair in row["seconds"]]


def _quantile(samples, part):
    """A quantile in ms, interpolated between the nearest samples."""
    ordered = sorted(samples)
    at = part * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return (ordered[low] + (at - low) * (ordered[high] - ordered[low])) * 1e3


def write(record, path):
    """Write JSON, one line for each case or row. An interrupted write leaves the old file."""
    head = {key: value for key, value in record.items() if key not in ("cases", "rows")}
    parts = [json.dumps(head, indent=1)[:-2]]
    for key in ("cases", "rows"):
        lines = ",\n  ".join(json.dumps(one) for one in record[key])
        parts.append(f' "{key}": [\n  {lines}\n ]')
    part = path.with_name(path.name + ".part")
    part.write_text(",\n".join(parts) + "\n}\n")
    os.replace(part, path)


def read(path):
    """Read a record written by `write`. UserError if the file is not one."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: expected a record of python -m bench kernels: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        got = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{path}: expected a record with schema {SCHEMA}, got {got}; measure anew")
    return record


def device_and_threads(machine):
    """The measured device; for a processor also the number of threads."""
    threads = f", {machine['threads']} threads" if machine["device"] == machine["processor"] else ""
    return machine["device"] + threads


def compare(record, old):
    """Add "change" to each row of `record`: p50 / (p50 of the same row in `old`) - 1."""
    before = {_key(old, row): row["ms"]["p50"] for row in old["rows"] if row["ms"]}
    for row in record["rows"]:
        was = before.get(_key(record, row)) if row["ms"] else None
        row["change"] = row["ms"]["p50"] / was - 1 if was else None
    return record


def never_ran(record):
    """{reason: titles of the providers that could run no case}."""
    found = {}
    for row in record["rows"]:
        if row["case"] is None:
            found.setdefault(row["reason"], []).append(row["title"])
    return found


def remark(record):
    """A sentence if some logits fit into the last-level cache, else None."""
    cache = record["machine"].get("last_level_cache_bytes") or 0
    sizes = [case["logits_bytes"] * case["nproc"] for case in record["cases"]]
    if not any(size <= cache for size in sizes):
        return None
    return (
        f"The last-level cache has {cache / 2**20:.0f} MiB, and the smallest logits have "
        f"{min(sizes) / 2**20:.0f} MiB. Forward never finds them in the cache; backward may"
    )


def _key(record, row):
    case = record["cases"][row["case"]]
    return (*(case[key] for key in CASE_KEY), row["provider"], row["mode"])


def write_csv(record, path):
    """Write one line for each row. The fields of its case come first."""
    lines = []
    for row in record["rows"]:
        of = {} if row["case"] is None else record["cases"][row["case"]]
        case = {key: of.get(key) for key in (*CASE_KEY, "logits_bytes")}
        flat = {**case, "machine": record["machine"]["device"]}
        for key, value in row.items():
            if isinstance(value, dict):
                flat |= {f"{key}_{inner}": v for inner, v in value.items()}
            elif key not in ("case", "samples_ms", "check", "ms", "memory"):
                flat[key] = value
        lines.append(flat)
    names = list(dict.fromkeys(name for line in lines for name in line))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)

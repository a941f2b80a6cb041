"""The record and the page of a run of `python -m bench gpu`.

    FOLDER/<device>.json    the rows of all benchmarks, as one record of `bench kernels`
    FOLDER/<device>.md      the same as tables, with what passed and failed
    FOLDER/linear/, FOLDER/launches/, FOLDER/parts/, FOLDER/logs/

`python -m bench readme --results FOLDER` reads the record.
"""

import time

from ..errors import UserError
from ..kernels import record as kernels_record
from ..pages import records as page
from ..pages.markdown import table
from . import parts
from .runner import verdict


class Written:
    """Writes record and page after each part. Called with the results so far."""

    def __init__(self, found, folder, command):
        self.found, self.folder, self.command = found, folder, command
        self.begun = time.time()

    def __call__(self, results, interrupted=False):
        sections = [_checks(self.found, results, interrupted)]
        if merged := self._merged():
            kernels_record.write(merged, self.record)
            sections.append(f"## Benchmark\n\n{page.section(merged, self.found.slug)}")
        linear = self._read(parts.linear_path(self.folder, self.found.slug))
        if linear and any(row["ms"] for row in linear["rows"]):
            sections.append(_linear(linear))
        launches = self._read(parts.launches_path(self.folder, self.found.slug))
        if launches and launches["rows"]:
            sections.append(_launches(launches))
        self.page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")

    @property
    def record(self):
        return self.folder / f"{self.found.slug}.json"

    @property
    def page(self):
        return self.folder / f"{self.found.slug}.md"

    def files(self):
        return [path for path in (self.record, self.page) if self._is_new(path)]

    def _merged(self):
        """One record of all benchmarks of this run that have measured something, or None."""
        paths = (parts.record_path(self.folder, name) for name in parts.BENCHMARKS)
        records = [record for path in paths if (record := self._read(path))]
        records = [one for one in records if any(row["ms"] for row in one["rows"])]
        return merge(records, self.command) if records else None

    def _read(self, path):
        if not self._is_new(path):
            return None
        try:
            return kernels_record.read(path)
        except UserError:
            return None  # its process was killed before it wrote anything

    def _is_new(self, path):
        """Whether a file is of this run: a folder may hold those of an earlier one."""
        return path.is_file() and path.stat().st_mtime >= self.begun - 1


def merge(records, command):
    """One record with the cases and rows of all `records` of `bench kernels`."""
    first = records[0]
    cases, rows, never = [], [], {}
    for record in records:
        shift = len(cases)
        cases += record["cases"]
        for row in record["rows"]:
            if row["case"] is None:
                never[row["provider"]] = row
            else:
                rows.append({**row, "case": row["case"] + shift})
    ran = {row["provider"] for row in rows}
    rows += [row for name, row in never.items() if name not in ran]
    return {
        "schema": first["schema"],
        "finished": all(record["finished"] for record in records),
        "machine": {**first["machine"], "command": command},
        "settings": first["settings"],
        "cases": cases,
        "rows": rows,
    }


def _checks(found, results, interrupted):
    lines = [[one.title, one.status, f"{one.seconds:.0f}", one.text] for one in results]
    about = "\n".join(f"    {line}" for line in found.lines)
    done = table(("part", "", "s", ""), lines, left=2)
    return f"# {found.slug}\n\n{about}\n\n{done}\n\n{verdict(results, interrupted)[1]}"


def _linear(record):
    sections = ["## Without the logits"]
    head = ("", "ms", "x products", "MiB beyond inputs and gradients")
    for index, case in enumerate(record["cases"]):
        rows = [row for row in record["rows"] if row["case"] == index and row["ms"]]
        lines = [
            [
                row["title"],
                f"{row['ms']['p50']:.2f}",
                "" if row["x_products"] is None else f"{row['x_products']:.2f}",
                f"{row['memory']['full'] / 2**20:.0f}" if row["memory"] else "",
            ]
            for row in rows
        ]
        sections.append(f"{case['name']}:\n\n{table(head, lines, left=1)}")
    return "\n\n".join(sections)


def _launches(record):
    head = ("kernel", "columns", "table, ms", "best, ms", "table", "best")
    lines = [
        [
            f"{row['backend']} {row['kernel']}",
            str(row["columns"]),
            *("" if row[key] is None else f"{row[key]:.3f}" for key in ("table_ms", "best_ms")),
            row["table"],
            row["best"] or row["reason"],
        ]
        for row in record["rows"]
    ]
    return f"## Launch tables\n\n{table(head, lines, left=1)}"

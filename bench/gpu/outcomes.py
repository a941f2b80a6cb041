"""What the output of a part says: tests that passed, rows that were measured."""

import json
import re
from pathlib import Path

from .runner import FAILED, PASSED, SKIPPED, by_status, last_line

UNFINISHED = ("pending", "unavailable")


def tests(ended):
    """Of pytest: where no test passed, nothing was checked."""
    counts = re.findall(r"^=*\s*((?:\d+ \w+(?:, )?)+) in [\d.]+s", ended.text, re.MULTILINE)
    said = counts[-1] if counts else ""
    if ended.late:
        status, why = by_status(ended)
        return status, f"{why}: {said}" if said else why
    if ended.status not in (0, NOTHING_SELECTED):
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", ended.text, re.MULTILINE)
        names = ", ".join(name.rpartition("::")[2] for name in failed[:3])
        said = said or last_line(ended.text)
        return FAILED, f"{said}: {names}" if names else said
    if "passed" not in said:
        reasons = re.findall(r"^\d+ tests? skipped: (.*)", ended.text, re.MULTILINE)
        return SKIPPED, reasons[-1] if reasons else "no test ran"
    return PASSED, said


NOTHING_SELECTED = 5  # pytest's exit status
#: What compute-sanitizer prints where it cannot run: in some containers and virtual machines.
UNUSABLE = ("Unable to find injection library", "Device not supported", "before first instrumented")


def sanitized(ended):
    """Of pytest under compute-sanitizer, which cannot be used on every machine."""
    summary = r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)"
    errors = re.findall(summary, ended.text)
    if any(int(count) for count in errors):
        return FAILED, f"{max(errors, key=int)} errors; see the log"
    status, said = tests(ended)
    if ended.late:  # slow is no fault: the same tests without the tool are a part of their own
        return SKIPPED, f"{said}, and no error until then"
    if status == FAILED and any(sign in ended.text for sign in UNUSABLE):
        return SKIPPED, "compute-sanitizer does not work on this machine"
    if status == PASSED and not errors:
        return FAILED, "compute-sanitizer printed no summary"
    return status, said


def of_record(path, broken_promises):
    """The outcome of a benchmark that writes its rows to `path` as it measures.

    One that reached its limit has passed if it has rows and none of ours is wrong.
    broken_promises  broken_promises(record) -> lines
    """

    def outcome(ended):
        rows, lines = _rows(path, broken_promises)
        if lines:
            return FAILED, f"{len(lines)} broken promises, the first: {lines[0]}"
        if ended.status and not ended.late:
            return by_status(ended)
        done = sum(row["status"] not in UNFINISHED for row in rows)
        if not done:
            return FAILED, f"no row was measured in {ended.seconds:.0f} s"
        todo = sum(row["status"] == "pending" for row in rows)
        text = f"{done} rows" + (f" of {done + todo}" if todo else "")
        return PASSED, text + ("; the time was over" if todo or ended.late else "")

    return outcome


def _rows(path, broken_promises):
    record = _read(path)
    return (record["rows"], broken_promises(record)) if record else ([], [])


def _read(path):
    """The record, or None if the part ended before it wrote one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def of_training(path):
    """The outcome of `bench sft`. Where the time was over, the finished steps are compared."""

    def outcome(ended):
        if ended.status and not ended.late:
            return by_status(ended)
        record = _read(path) or {"losses": {}}
        steps = min(map(len, record["losses"].values()), default=0)
        if not steps:
            return FAILED, f"no step was finished in {ended.seconds:.0f} s"
        from ..sft.losses import disagreement

        if wrong := disagreement(record["losses"]):
            return FAILED, wrong
        return PASSED, f"{steps} steps" + ("" if record["finished"] else "; the time was over")

    return outcome


# Imported late: these modules need torch, without which there are no rows.


def of_kernels(record):
    from ..kernels.table import broken_promises

    return broken_promises(record)


def of_linear(record):
    from ..linear.table import broken_promises

    return broken_promises(record)


def of_launches(record):
    return [row["reason"] for row in record["rows"] if row["status"] == "wrong"]

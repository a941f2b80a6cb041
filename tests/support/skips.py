"""A pytest plugin: after a run, one line for each reason why something was not tested."""

from collections import defaultdict

import pytest


def pytest_terminal_summary(terminalreporter):
    tests, files = defaultdict(set), defaultdict(set)
    for report in terminalreporter.stats.get("skipped", []):
        # A file skipped while it was collected has a report of another kind; two workers send two.
        kind = files if isinstance(report, pytest.CollectReport) else tests
        kind[_reason(report)].add(report.nodeid)
    for reason in sorted(tests):
        _write(terminalreporter, f"{_count(tests[reason], 'test')} skipped: {reason}")
    for reason in sorted(files):
        names = ", ".join(sorted(files[reason]))
        _write(terminalreporter, f"{_count(files[reason], 'file')} skipped: {reason} ({names})")


def _reason(report):
    _file, _line, message = report.longrepr
    return message.removeprefix("Skipped: ")


def _count(those, what):
    return f"{len(those)} {what}{'s' if len(those) > 1 else ''}"


def _write(terminalreporter, text):
    terminalreporter.write_line(text, yellow=True)

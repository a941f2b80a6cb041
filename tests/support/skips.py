"""A pytest plugin: after a run, prints one line per reason for skipped tests."""

from collections import defaultdict

import pytest


def pytest_terminal_summary(terminalreporter):
    tests, files = defaultdict(set), defaultdict(set)
    for report in terminalreporter.stats.get("skipped", []):
        # A file skipped during collection has a CollectReport; with two workers it arrives twice.
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

"""Peak memory of a piece of work, in bytes beyond what was there when it began.

Two figures, because neither tells all:

allocated  what torch's allocator handed out. On a CPU the profiler reports every allocation and
           release in order, and they are added up: exact to the byte, the same run after run. It
           does not report the release of what was allocated before it started, so a record must
           be open before the work's inputs are made if the work releases them. On CUDA it is the
           caching allocator's own peak. This is the figure of record.
resident   the process's resident set, from the kernel's high-water mark (Linux only, None
           elsewhere). It also sees what native code takes behind torch's back, but only pages
           that were touched, nothing where the C library reuses memory it had kept, and with it
           whatever else the process does at that time, the profiler included: good to a few MiB.
           It shows that the figure of record hides nothing.
"""

import ctypes
import json
import os
import tempfile
from dataclasses import dataclass

# The profiler announces itself on stderr otherwise; read when torch loads it.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch.profiler import ProfilerActivity, profile, record_function


@dataclass(frozen=True)
class Usage:
    """Bytes beyond the level at the start; `held` is what is still there at the end."""

    peak: int
    held: int
    resident_peak: int | None


def peak_memory(fn, device="cpu"):
    """Usage of `fn()`. What it returns is alive at the end: it counts as held."""
    with MemoryRecord(device) as record:
        record.mark("begin")
        result = fn()
        record.mark("end")
    del result
    return record.usage("begin", "end")


class MemoryRecord:
    """Memory between marks that the work itself sets, one process and one device at a time.

        with MemoryRecord() as record:
            record.mark("begin")
            ...
            record.mark("end")
        record.usage("begin", "end").peak

    A mark may be set anywhere on the thread that runs the work, in an autograd hook too. The work
    runs slower than it otherwise would: time it in another run.
    """

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.marks = []
        self._levels = {}  # mark -> (allocated then, highest since the mark before)
        self._resident = {}  # the same for the resident set

    def __enter__(self):
        _return_free_memory()
        if self.device.type == "cpu":
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        if self.device.type != "cpu":
            return
        self._profile.__exit__(kind, error, trace)
        if kind is None:
            self._levels = self._replay()

    def mark(self, name):
        if name in self.marks:
            raise ValueError(f"expected a new mark, got {name!r} again; marks: {self.marks}")
        self.marks.append(name)
        self._resident[name] = _resident_bytes()
        if self.device.type == "cpu":
            with record_function(_MARK + name):
                pass
        else:
            self._levels[name] = (
                torch.cuda.memory_allocated(self.device),
                torch.cuda.max_memory_allocated(self.device),
            )
            torch.cuda.reset_peak_memory_stats(self.device)

    def usage(self, begin, end, base=None):
        """Usage between two marks, beyond the level at mark `base` (default: at `begin`)."""
        for name in (begin, end):
            if name not in self._levels:
                raise ValueError(f"expected one of the marks {list(self._levels)}, got {name!r}")
        first, last = self.marks.index(begin), self.marks.index(end)
        inside = self.marks[first + 1 : last + 1]

        def beyond(levels):
            floor = levels[base or begin][0]
            peak = max(levels[begin][0], *(levels[name][1] for name in inside))
            return peak - floor, levels[end][0] - floor

        resident = None if None in self._resident.values() else beyond(self._resident)[0]
        return Usage(*beyond(self._levels), resident)

    def _replay(self):
        """Mark -> (level, highest level since the mark before), from the profiler's own trace."""
        levels, level, highest = {}, 0, 0
        for event in sorted(self._events(), key=lambda event: event["ts"]):
            if event["name"].startswith(_MARK):
                levels[event["name"].removeprefix(_MARK)] = (level, highest)
                highest = level
            elif event["name"] == "[memory]" and event["args"]["Device Type"] == 0:
                level += event["args"]["Bytes"]
                highest = max(highest, level)
        return levels

    def _events(self):
        # The exported trace is the documented place where allocations appear one by one.
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "trace.json")
            self._profile.export_chrome_trace(path)
            with open(path, encoding="utf-8") as file:
                return [e for e in json.load(file)["traceEvents"] if "ts" in e]


_MARK = "memory mark: "


def _return_free_memory():
    """Let the C library give back what it keeps, so that the resident set shows it taken again."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        pass


def _resident_bytes():
    """(resident now, highest since the last call), or None where the kernel does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
        now, highest = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # resets the high-water mark
    except (OSError, KeyError):
        return None
    return now, highest

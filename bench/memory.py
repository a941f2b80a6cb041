"""Peak memory of a piece of work, in bytes above the level when it began.

There are two figures, because neither is complete:

allocated  Memory that torch's allocator handed out. On a CPU the profiler reports every allocation
           and release in order, and they are added up. The result is exact to the byte, and the
           same in every run. The profiler does not report the release of memory that was allocated
           before it started. If the work releases its inputs, open the record before they are made.
           On CUDA it is the peak of the caching allocator. Promises are checked with this figure.
resident   The process's resident set, from the kernel's high-water mark (None except on Linux). It
           also counts memory that native code takes without torch. But it counts only pages that
           were touched, and misses memory that the C library had kept and uses again. It includes
           everything that the process does at that time, even the profiler. It is good to a few
           MiB, and shows that the first figure misses nothing.
"""

import ctypes
import json
import os
import tempfile
from dataclasses import dataclass

# Without it the profiler writes a notice to stderr. It is read when torch loads the profiler.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch.profiler import ProfilerActivity, profile, record_function


@dataclass(frozen=True)
class Usage:
    """Bytes above the level at the start. `held` is still allocated at the end."""

    peak: int
    held: int
    resident_peak: int | None


def peak_memory(fn, device="cpu"):
    """Usage of `fn()`. Its result is alive at the end, so it counts as held."""
    with MemoryRecord(device) as record:
        record.mark("begin")
        result = fn()
        record.mark("end")
    del result
    return record.usage("begin", "end")


class MemoryRecord:
    """Memory between marks that the work sets. For one process and one device at a time.

        with MemoryRecord() as record:
            record.mark("begin")
            ...
            record.mark("end")
        record.usage("begin", "end").peak

    A mark may be set anywhere on the thread that runs the work, also in an autograd hook. Recording
    slows the work down, so time it in another run.
    """

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.marks = []
        self._levels = {}  # mark -> (level there, highest since the mark before)
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
        """Usage between two marks, above the level at mark `base` (default: `begin`)."""
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
        """{mark: (level, highest level since the mark before)}, from the profiler's trace."""
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
        # The exported trace is documented, and lists every single allocation.
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "trace.json")
            self._profile.export_chrome_trace(path)
            with open(path, encoding="utf-8") as file:
                return [e for e in json.load(file)["traceEvents"] if "ts" in e]


_MARK = "memory mark: "


def _return_free_memory():
    """Make the C library return the memory it keeps, so that its reuse shows as resident."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        pass


def _resident_bytes():
    """(resident now, highest since the last call), or None if the kernel does not report them."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
        now, highest = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # resets the high-water mark
    except (OSError, KeyError):
        return None
    return now, highest

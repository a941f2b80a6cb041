"""Marks in time, on the device's own clock where it has one."""

import time

import torch


class Clock:
    """`start()`, some work, `mark()`, more work, `mark()`: intervals() are what lies between.

    No synchronisation in between: on CUDA a mark is an event in the stream.
    """

    def __init__(self, device):
        self.cuda = torch.device(device).type == "cuda"
        self.marks = []

    def start(self):
        """Wait for what came before, forget older marks, then mark."""
        self.marks = []
        self.wait()
        self.mark()

    def mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def intervals(self):
        """Seconds between marks, one after the other."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.cuda:
            return [b - a for a, b in pairs]
        self.wait()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]

    def wait(self):
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()

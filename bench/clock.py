"""Marks in time, on the device's own clock where it has one."""

import time

import torch

LEAD_BYTES, LEAD_FILLS = 2**28, 32  # 8 GiB to write: some milliseconds on any GPU


class Clock:
    """`start()`, some work, `mark()`, more work, `mark()`: intervals() are what lies between.

    No synchronisation in between: on CUDA a mark is an event in the stream.

    ahead  the device's time alone. While a GPU waits for its next kernel the host's time would
           count; so `start()` first gives it something else to do, and the work is launched
           meanwhile, as in a training step, where the host is ahead. Work that takes the host
           longer than that is still charged for it. Of no effect on a CPU.
    """

    def __init__(self, device, ahead=False):
        self.cuda = torch.device(device).type == "cuda"
        self.marks = []
        self._lead = None
        if ahead and self.cuda:
            self._lead = torch.empty(LEAD_BYTES, dtype=torch.uint8, device=device)

    def start(self):
        """Wait for what came before, forget older marks, then mark."""
        self.marks = []
        self.wait()
        if self._lead is not None:
            for _ in range(LEAD_FILLS):
                self._lead.zero_()
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

"""Marks in time: CUDA events on a GPU, the host's clock on a CPU."""

import time

import torch

LEAD_BYTES, LEAD_FILLS = 2**28, 32  # writes 8 GiB: some milliseconds on any GPU


class Clock:
    """Times work between marks: `start()`, work, `mark()`, more work, `mark()`, `intervals()`.

    A mark does not synchronise: on CUDA it is an event in the stream.

    ahead  measure the device's time only. A GPU that waits for its next kernel would add the host's
           time. So `start()` first gives the GPU other work, and the host launches the measured
           work meanwhile, as in a training step, where the host is ahead. If the launches take
           longer than that other work, the rest of their time still counts. No effect on a CPU.
    """

    def __init__(self, device, ahead=False):
        self.cuda = torch.device(device).type == "cuda"
        self.marks = []
        self._lead = None
        if ahead and self.cuda:
            self._lead = torch.empty(LEAD_BYTES, dtype=torch.uint8, device=device)

    def start(self):
        """Wait for earlier work, drop the old marks, then mark."""
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
        """Seconds between each mark and the next."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.cuda:
            return [b - a for a, b in pairs]
        self.wait()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]

    def wait(self):
        """Wait until the device has finished its work."""
        if self.cuda:
            torch.cuda.synchronize()

"""Executes PTX on the CPU: enough of it for the code that compilers make of elementwise kernels.

    kernel = Kernel(ptx_text)
    machine = Machine()
    address = machine.add("logits", array)
    machine.launch(kernel, grid, threads, [address, 4096, ...])
    machine.counts.loaded["logits"]  # bytes

All threads of a block advance together as the lanes of numpy arrays. Counted as executed: bytes by
buffer and address space, warp instructions, exponentials, shuffles, barriers. An access outside a
buffer, a misaligned one, a shuffle without all its lanes and a barrier that not all threads reach
are errors. With `seed` warps run in a random order between barriers, which shows a missing one.

A copy by cp.async is made when its thread waits for it, and not before. A cluster is one block.

Not here: bulk copies, mbarriers, larger clusters, matrix instructions, textures.
"""

from .machine import Counts, Machine
from .parser import Kernel, entries

__all__ = ["Counts", "Kernel", "Machine", "entries"]

"""A PTX interpreter on the CPU. It covers the code that compilers emit for elementwise kernels.

    kernel = Kernel(ptx_text)
    machine = Machine()
    address = machine.add("logits", array)
    machine.launch(kernel, grid, threads, [address, 4096, ...])
    machine.counts.loaded["logits"]  # bytes

All threads of a block advance together, as lanes of numpy arrays. The machine counts executed work:
bytes by buffer and address space, warp instructions, exponentials, shuffles, barriers. Errors are:
an access outside a buffer, a misaligned access, a shuffle without all its lanes, and a barrier that
some threads do not reach. With `seed`, warps run in a random order between barriers; this exposes a
missing barrier.

cp.async copies when its thread waits for it; with `seed` half of the copies happen at once. A
cluster is one block.

Not supported: bulk copies, mbarriers, larger clusters, matrix instructions, textures.
"""

from .machine import Counts, Machine
from .parser import Kernel, entries

__all__ = ["Counts", "Kernel", "Machine", "entries"]

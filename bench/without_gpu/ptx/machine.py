"""Run the blocks of a launch one after the other."""

import numpy as np

from .block import Block
from .memory import Counts, Global
from .parser import Kernel
from .values import RAW, raw

WARP = 32
MOST_STEPS = 32  # a randomly chosen warp runs at most this many instructions in a row


class Machine:
    """Global memory and counts, kept across launches.

    With `seed`, blocks, and warps between barriers, run in a random order; without it, in step.
    """

    def __init__(self, seed: int | None = None):
        self.memory = Global()
        self.counts = Counts()
        self.random = None if seed is None else np.random.default_rng(seed)

    def add(self, name: str, array) -> int:
        return self.memory.add(name, array)

    def launch(self, kernel: Kernel, grid: int, threads: int, arguments, dynamic_shared: int = 0):
        """Run `grid` blocks. `arguments` are integers (or addresses), floats and bytes of structs,
        in order."""
        parameters = _parameter_bytes(kernel, arguments)
        blocks = range(grid) if self.random is None else self.random.permutation(grid)
        for number in blocks:
            block = Block(self, kernel, int(number), grid, threads, parameters, dynamic_shared)
            self._run(block)

    def _run(self, block: Block) -> None:
        if self.random is None:
            everyone = np.ones(block.threads, bool)
            while block.step(everyone):
                pass
            return
        warp = block.lanes // WARP
        while len(ready := np.unique(warp[block.ready()])):
            mine = warp == self.random.choice(ready)
            for _ in range(self.random.integers(1, MOST_STEPS + 1)):
                if not block.step(mine):
                    break


def _parameter_bytes(kernel: Kernel, arguments):
    if len(arguments) > len(kernel.parameters):
        raise ValueError(
            f"expected at most {len(kernel.parameters)} arguments, got {len(arguments)}"
        )
    space = np.zeros(4096, np.uint8)
    pairs = zip(kernel.parameters.values(), arguments, strict=False)  # Triton's scratch stays 0
    for parameter, value in pairs:
        end = parameter.offset + parameter.size
        space[parameter.offset : end] = _argument_bytes(parameter, value)
    return space


def _argument_bytes(parameter, value):
    if isinstance(value, bytes):
        if len(value) != parameter.size:
            raise ValueError(f"expected {parameter.size} bytes of a struct, got {len(value)}")
        return np.frombuffer(value, np.uint8)
    number = np.array([value]) if isinstance(value, float) else np.array([value], np.int64)
    bits = raw(number, parameter.kind) if parameter.kind[0] == "f" else number.view(RAW)
    return bits.view(np.uint8)[: parameter.size]

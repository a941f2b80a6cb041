"""The supported chips: throughput per clock, capacity, and the document behind each figure.

This is the only list of chips outside the build. Tables, audit, offline compilation and tests use
it. csrc/toolchains keeps a second list, because the build runs where nothing is installed; a test
compares the two.

Sources: [1] CUDA Programming Guide, appendix "Compute Capabilities" (technical specifications and
instruction throughput); [2] CUDA occupancy calculator: registers are allocated per warp in units of
256, shared memory per block with 1 KiB for the system; [3] NVIDIA data sheets of the A100 80 GB
SXM, the H100 SXM and the HGX B200; clocks give the peak FP32 rate stated there;
[4] AMD CDNA2, CDNA3 and CDNA4 ISA guides: 512 VGPRs per lane and SIMD in units of 8, at most 8
waves per SIMD, 4 SIMDs of 16 lanes, LDS; [5] LLVM's AMDGPU usage guide and SISchedule.td: a
transcendental takes four passes of a plain VALU instruction; [6] AMD data sheets of the MI250X,
MI300X and MI355X; [7] NVIDIA's data sheet of the RTX PRO 6000 Blackwell: 24064 CUDA cores, 128 an
SM, 1792 GB/s, 125 TFLOP/s in FP32. Blocks of an SM of 12.0: 24 in [1], 32 in the Blackwell tuning
guide; the smaller number is taken.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of a chip that launches and predictions use. A *unit* is an SM or a CU."""

    device: str
    build: str  # the target of the wheels, as csrc/toolchains spells it
    bandwidth: float  # bytes per second of device memory
    units: int
    clock: float  # Hz, peak
    threads: int  # per unit
    blocks: int  # per unit
    shared_bytes: int  # per unit
    shared_bytes_of_block: int
    shared_bytes_reserved: int  # per block, by the system
    registers: int  # 32-bit, per lane of a scheduler (a unit has four)
    register_unit: int  # registers per lane are allocated in multiples of this
    lanes: dict[str, tuple[str, int]]  # class of instruction -> (pipe, lanes per clock and unit)

    @property
    def warp(self) -> int:
        return 64 if self.lanes is _AMD else 32

    @property
    def bytes_to_keep_in_flight(self) -> float:
        """Bytes per unit that keep memory busy: its bandwidth times 800 ns of latency."""
        return self.bandwidth * 800e-9 / self.units


# [1], per SM: 16 special functions; 64 integer, compare and convert; FP32 64 (8.0) or 128. Four
# schedulers issue one warp each. Two-wide FP32 (10.0) has half the lanes. IMAD shares the FMA pipe
# at half rate. Uniform and memory instructions cost an issue slot only.
def _nvidia(fp32: int) -> dict[str, tuple[str, int]]:
    return {
        "fp32": ("fma", fp32),
        "fp32x2": ("fma", fp32 // 2),
        "imad": ("fma", 64),
        "alu": ("alu", 64),
        "transcendental": ("mufu", 16),
        "every": ("issue", 128),
    }


# [4, 5], per CU: a wave of 64 occupies a SIMD of 16 lanes for four clocks, a transcendental for 16.
# A scalar instruction serves all 64 lanes of a wave; one is issued per clock.
_AMD = {
    "valu": ("valu", 64),
    "transcendental": ("valu", 16),
    "salu": ("salu", 64),
}


def _sm(device, build, bandwidth, units, clock, shared, fp32, threads=2048, blocks=32) -> Limits:
    return Limits(
        device, build, bandwidth, units, clock, threads, blocks, shared * 1024,
        (shared - 1) * 1024, 1024, 512, 8, _nvidia(fp32),
    )  # fmt: skip


def _cu(device, build, bandwidth, units, clock, lds) -> Limits:
    return Limits(
        device, build, bandwidth, units, clock, 2048, 32, lds * 1024, lds * 1024, 0, 512, 8, _AMD
    )


CHIPS = {
    "sm_80": _sm("A100 80GB", "8.0", 2.039e12, 108, 1.41e9, 164, 64),  # [1, 3]
    "sm_90": _sm("H100 SXM", "9.0a", 3.35e12, 132, 1.98e9, 228, 128),  # [1, 3]: 67 TFLOP/s
    "sm_100": _sm("B200", "10.0+PTX", 8.0e12, 148, 1.98e9, 228, 128),  # [1, 3]: 75 TFLOP/s
    "sm_120": _sm("RTX PRO 6000", "12.0", 1.792e12, 188, 2.6e9, 100, 128, 1536, 24),  # [1, 7]
    "gfx90a": _cu("MI250X die", "gfx90a", 1.6e12, 110, 1.7e9, 64),  # [4, 6]
    "gfx942": _cu("MI300X", "gfx942", 5.3e12, 304, 2.1e9, 64),  # [4, 6]
    "gfx950": _cu("MI355X", "gfx950", 8.0e12, 256, 2.4e9, 160),  # [4, 6]
}

NVIDIA = tuple(name for name, chip in CHIPS.items() if chip.warp == 32)
#: Those for which Triton's kernels are compiled here. sm_120 takes the lines of sm_100.
TRITON = tuple(name for name in CHIPS if name != "sm_120")
AMD = tuple(name for name, chip in CHIPS.items() if chip.warp == 64)


def resident_threads(limits: Limits, threads: int, registers: int, shared: int) -> tuple[int, str]:
    """Threads of a kernel that a unit holds at once, and the resource that limits them.

    `registers` is per thread; `shared` bytes and `threads` are per block. The 512 registers of a
    lane serve the threads of a quarter of the unit's warps: NVIDIA's 64 Ki registers are 512 for
    each of 128 lanes.
    """
    granted = -(-max(registers, 1) // limits.register_unit) * limits.register_unit
    warps_of_block = -(-threads // limits.warp)
    warps = min(4 * (limits.registers // granted), limits.threads // limits.warp)
    blocks = {
        "threads": limits.threads // threads,
        "blocks": limits.blocks,
        "registers": warps // warps_of_block,
        "shared memory": limits.shared_bytes // max(1, shared + limits.shared_bytes_reserved),
    }
    reason = min(blocks, key=blocks.get)
    return blocks[reason] * threads, reason

"""Expected registers and bytes in flight of the compiled kernels; the launch tables rely on them.

They hold for the widest line of a table and rows that start at multiples of 16 bytes. Tests compile
the kernels and compare, so a change to a kernel or table shows its cost here. Measured with Triton
3.9 with ptxas 13, nvcc 13.0, clang 19.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    bf16: int  # registers per thread
    fp32: int
    in_flight: int  # KiB of bf16 logits that all resident threads of an SM or CU load at once


#: By chip and use; triton_kernels/launch.py lists the USES.
TRITON = {
    ("sm_80", "row_stats"): Budget(37, 39, 48),
    ("sm_80", "row_grad"): Budget(40, 52, 48),
    ("sm_90", "row_stats"): Budget(48, 45, 40),
    ("sm_90", "row_grad"): Budget(40, 56, 48),
    ("sm_100", "row_stats"): Budget(53, 53, 72),
    ("sm_100", "row_stats softcap"): Budget(40, 40, 48),
    ("sm_100", "row_stats metrics"): Budget(50, 40, 18),
    ("sm_100", "row_grad"): Budget(40, 56, 48),
    ("gfx90a", "row_stats"): Budget(41, 43, 64),
    ("gfx90a", "row_grad"): Budget(61, 62, 64),
    ("gfx942", "row_stats"): Budget(44, 51, 64),
    ("gfx942", "row_grad"): Budget(63, 61, 64),
    ("gfx950", "row_stats"): Budget(44, 51, 64),
    ("gfx950", "row_grad"): Budget(60, 61, 64),
}

#: By chip and kernel. clang 19 does not know gfx950.
CSRC = {
    ("sm_80", "row_stats"): Budget(59, 64, 64),
    ("sm_80", "row_grad"): Budget(56, 70, 72),
    ("sm_80", "row_stats_grad"): Budget(101, 103, 32),
    ("sm_90", "row_stats"): Budget(62, 64, 64),
    ("sm_90", "row_grad"): Budget(56, 71, 72),
    ("sm_90", "row_stats_grad"): Budget(103, 111, 32),
    ("sm_100", "row_stats"): Budget(71, 80, 56),
    ("sm_100", "row_grad"): Budget(63, 75, 64),
    ("sm_100", "row_stats_grad"): Budget(128, 128, 32),
    ("sm_120", "row_stats"): Budget(71, 80, 56),
    ("sm_120", "row_grad"): Budget(63, 78, 64),
    ("sm_120", "row_stats_grad"): Budget(128, 128, 32),
    ("gfx90a", "row_stats"): Budget(58, 52, 128),
    ("gfx90a", "row_grad"): Budget(47, 64, 128),
    ("gfx90a", "row_stats_grad"): Budget(108, 124, 256),
    ("gfx942", "row_stats"): Budget(58, 52, 128),
    ("gfx942", "row_grad"): Budget(47, 64, 128),
    ("gfx942", "row_stats_grad"): Budget(108, 126, 256),
}

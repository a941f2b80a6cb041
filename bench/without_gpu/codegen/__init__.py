"""Audit of the compiled GPU kernels: reads their machine code; needs no GPU."""

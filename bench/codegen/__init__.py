"""What the compilers made of the Triton kernels, read from machine code; needs no GPU."""

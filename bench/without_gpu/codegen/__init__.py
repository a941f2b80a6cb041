"""What the compilers made of the GPU kernels, read from machine code; needs no GPU."""

"""python -m bench kernels: time and memory of the loss beside every peer, on this machine."""

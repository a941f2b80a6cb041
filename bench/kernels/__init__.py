"""python -m bench kernels: time and memory of the loss and of its peers, on this machine."""

"""Triton kernels of the row operations, installed as ``fused_sft_loss.triton_kernels``."""

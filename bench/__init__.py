"""Benchmarks and demonstrations of fused_sft_loss: `python -m bench --help` lists them."""

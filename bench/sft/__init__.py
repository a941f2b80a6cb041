"""python -m bench sft: a Megatron SFT run: the reference loss, ours, and ours without logits."""

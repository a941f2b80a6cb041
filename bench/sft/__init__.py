"""python -m bench sft: a real Megatron SFT run, twice over: the reference loss and ours."""

"""python -m bench sft: a real Megatron SFT run, with the reference loss and with ours."""

"""Several documents in one sequence: python -m examples.packed_sequences

No token is predicted from the document before it. The attention must not cross documents either.
"""

import torch

from examples.small_run import SEQ, make_batches, run_schedule
from fused_sft_loss.megatron import make_forward_step

LENGTHS = (10, 6, 16)  # of the documents in each sequence


def pack(batch):
    """Document boundaries over the flattened b*s positions, positions, and a block mask."""
    lengths = torch.tensor(LENGTHS * len(batch["tokens"]))
    document = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    causal = torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
    visible = causal & (document[:, None] == document[None, :])
    return {
        **batch,
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS]).expand_as(batch["tokens"]),
        "attention_mask": ~visible[None, None],  # True: hidden
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
    }


forward_step = make_forward_step(lambda data_iterator: pack(next(data_iterator)))


def main():
    return run_schedule(forward_step, make_batches())


if __name__ == "__main__":
    _, loss, tokens = main()
    print(f"mean loss of {tokens:.0f} scored tokens: {loss / tokens:.4f}")

"""A sequence split over two processes: torchrun --nproc-per-node 2 -m examples.context_parallel

A rank holds two chunks of the sequence that are not neighbours, so the next token may be on the
other rank. Shift the whole sequence first, slice it after, and pass shift=False.
"""

from examples.small_run import make_batches, run_schedule
from fused_sft_loss import shift_targets
from fused_sft_loss.megatron import make_forward_step
from fused_sft_loss.megatron.versions import context_parallel_slice


def get_batch(data_iterator):
    batch = next(data_iterator)  # the same whole sequences on both ranks
    labels, loss_mask = shift_targets(batch["tokens"], batch["loss_mask"])
    return context_parallel_slice({**batch, "labels": labels, "loss_mask": loss_mask})


forward_step = make_forward_step(get_batch, shift=False)


def main(cp=2):
    return run_schedule(forward_step, make_batches(), cp=cp)


if __name__ == "__main__":
    _, loss, tokens = main()
    print(f"this rank's part: mean loss of {tokens:.0f} scored tokens: {loss / tokens:.4f}")

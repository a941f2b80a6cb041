"""A Megatron forward step of your own, with the vocabulary sharded over two processes:

torchrun --nproc-per-node 2 -m examples.megatron_step
"""

from functools import partial

from examples.small_run import make_batches, run_schedule
from fused_sft_loss.megatron import sft_loss_func


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    # Without labels the model returns logits, [b, s, V / tensor-parallel size].
    logits = model(batch["tokens"], batch["position_ids"], batch["attention_mask"])
    # The labels are the tokens: the loss shifts them. loss_mask says which of them count.
    return logits, partial(sft_loss_func, batch["tokens"], batch["loss_mask"])


def main(tp=2):
    return run_schedule(forward_step, make_batches(), tp=tp)


if __name__ == "__main__":
    _, loss, tokens = main()
    print(f"mean loss of {tokens:.0f} scored tokens: {loss / tokens:.4f}")

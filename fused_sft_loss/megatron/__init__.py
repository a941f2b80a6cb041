"""The loss for Megatron: a forward_step, a loss_func, and a replacement of its cross-entropy.

Let this package make the forward_step:

    from fused_sft_loss.megatron import make_forward_step
    forward_backward_func(forward_step_func=make_forward_step(get_batch), ...)

or write a forward_step that calls the model *without* labels:

    output_tensor = model(tokens, position_ids, attention_mask)
    return output_tensor, partial(sft_loss_func, labels, loss_mask)

or wrap a trainer's forward_step, which calls the model *with* labels:

    with fused_cross_entropy(model):
        output_tensor, loss_func = forward_step(data_iterator, model)

The gradient. Micro-batch i has S_i = sum(w * loss), n_i = number of tokens with w != 0, W_i =
sum(w). There are M micro-batches on each of D data-parallel ranks; mean() is over all D*M:

    returns      calculate_per_token_loss   gradient of           "lm loss" reported
    "per_token"  True                       sum S_i / sum n_i     sum S_i / sum n_i
    "per_token"  False                      mean(S_i / n_i)       sum S_i / sum n_i
    "mean"       False                      mean(S_i / W_i)       mean over M of (sum_D S / sum_D W)
    "mean"       True                       refused: summed over D where it should be averaged
    "per_sample" True                       mean over all samples   the same
    "per_sample" False                      mean over D*M of the mean over their samples

**Only the first row is the token-weighted mean of the global batch.** Rows two and three are means
of means: a token weighs more in a micro-batch with few scored tokens. "per_sample" weighs samples
alike: documents or rows of the batch, each with the mean sum(w * loss) / sum(w). Under context
parallelism rows one, three and five stay the same; in row two n_i counts the tokens of a shard, and
the last row is refused.

For megatron-core >= 0.14; docs/megatron.md has the versions tested and a guide for each trainer.
This package never imports Megatron when it is imported itself.
"""

from .context import fused_cross_entropy
from .cross_entropy import vocab_parallel_cross_entropy
from .forward_step import make_forward_step
from .head import ResponseOnlyHead
from .linear_head import LinearHead
from .loss_func import sft_loss_func
from .packing import shift_packed_targets

__all__ = ["LinearHead", "ResponseOnlyHead", "fused_cross_entropy", "make_forward_step"]
__all__ += ["sft_loss_func", "shift_packed_targets", "vocab_parallel_cross_entropy"]

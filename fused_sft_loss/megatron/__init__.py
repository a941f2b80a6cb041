"""The loss as Megatron wants it: a loss_func, a forward_step, and a stand-in for its cross-entropy.

    from fused_sft_loss.megatron import make_forward_step
    forward_backward_func(forward_step_func=make_forward_step(get_batch), ...)

or, in a forward_step of your own, with the model called *without* labels:

    output_tensor = model(tokens, position_ids, attention_mask)
    return output_tensor, partial(sft_loss_func, labels, loss_mask)

or around a trainer's own forward_step, which calls the model *with* labels:

    with fused_cross_entropy(model):
        output_tensor, loss_func = forward_step(data_iterator, model)

What is trained on. Micro-batch i has S_i = sum(w * loss), n_i = tokens with w != 0, W_i = sum(w);
there are M micro-batches on each of D data-parallel ranks; mean() is over all D*M:

    returns      calculate_per_token_loss   gradient of           "lm loss" reported
    "per_token"  True                       sum S_i / sum n_i     sum S_i / sum n_i
    "per_token"  False                      mean(S_i / n_i)       sum S_i / sum n_i
    "mean"       False                      mean(S_i / W_i)       mean over M of (sum_D S / sum_D W)
    "mean"       True                       refused: summed over D where it should be averaged

**Only the first row is the token-weighted mean of the global batch.** The others are means of
means: a token of a micro-batch with few scored tokens weighs more than one among many. Context
parallelism leaves rows one and three as they are; in row two n_i is then that of a shard.

For megatron-core >= 0.14; docs/megatron.md has the versions tested and a guide for each trainer.
Nothing here imports Megatron: what has not been imported has not been initialised either.
"""

from .forward_step import make_forward_step
from .head import ResponseOnlyHead
from .loss_func import sft_loss_func
from .packing import shift_packed_targets
from .seam import fused_cross_entropy

__all__ = ["ResponseOnlyHead", "fused_cross_entropy", "make_forward_step"]
__all__ += ["sft_loss_func", "shift_packed_targets"]

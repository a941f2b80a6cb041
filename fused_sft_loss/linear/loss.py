"""linear_sft_loss: the loss of hidden states and an output layer."""

from typing import Any

from torch import Tensor

from .. import samples
from ..api import LossTerms, TokenMetrics
from ..options import Options
from .call import Sizes, prepared


def linear_sft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    rows: int | None = None,
    multiple: int = 1,
    sequence_parallel: bool = False,
    **options: Any,
) -> Tensor:
    """:func:`sft_loss` of ``hidden @ weight.T + bias``, without the logits.

    Only scored rows are multiplied, and their logits exist one tile at a time, never as a whole.
    Backward computes them again: four matrix products of R x v x h for R scored rows, where a layer
    and a loss take three for all rows. With ``grad_in_forward`` it is three for R rows. Under
    torch.autocast hidden, weight and bias are cast as torch.nn.functional.linear casts them.

    Besides inputs and gradients, memory holds one tile, the R x h scored rows and their gradient in
    fp32, a tile's c columns of the weight's gradient in fp32 unless one tile has all rows, three or
    four numbers for each row and tile, and vectors of the N rows. A CPU without 16-bit products
    also converts c x h of a 16-bit weight at a time. With ``grad_in_forward`` the gradients of
    weight and hidden are held from forward to backward, that of the weight, v x h, in fp32; under
    tensor parallelism there are two tiles. The gradient of the weight is a sum in fp32, rounded
    once.

    Args:
        hidden: `[b, s, h]`, `[s, b, h]` with ``layout="sbv"``, or `[n, h]`; bf16, fp16 or fp32, h
            contiguous. With ``sequence_parallel`` this rank's part of s (or n).
        weight: `[v, h]`, in the dtype of hidden. `v` is this rank's shard of the vocabulary. If it
            does not require a gradient, none is computed. A DTensor that FSDP shards is gathered
            once, and its gradient is averaged over the ranks, as FSDP does.
        labels, loss_mask: as in :func:`sft_loss`, of the whole sequence on every rank.
        bias: `[v]`, or None.
        reduction: as in :func:`sft_loss`.
        chunk_rows: a tile has at most as many logits as this many rows. None: a tile of 128 MiB,
            on a CPU 4 MiB, which is also the most there. With `grad_in_forward` 512 MiB, on a CPU
            128 MiB: it gets slower with smaller tiles.
        rows: at least the number of scored rows. The host does not wait for that number then, and
            shapes are fixed, as torch.compile and CUDA graphs need. If more are scored, the loss is
            NaN; on a CPU, and with FUSED_SFT_LOSS_CHECK=1, a ValueError is raised.
        multiple: round the number of scored rows up to a multiple of this.
        sequence_parallel: the ranks of `tp_group` hold neighbouring parts of the sequence, in rank
            order. They are gathered, and the gradient is scattered again.
        **options: those of :func:`sft_loss` except `inplace_backward`.

    Returns:
        The loss, fp32: 0-d, or in the labels' shape with ``reduction="none"``. It is differentiable
        in hidden, weight and bias. Under tensor parallelism the gradient of hidden is summed over
        the ranks, in its own dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`sft_loss`.
    """
    of_kernels, per_sample = samples.of_kernels(reduction)
    given = Options(**options)
    sizes = Sizes(chunk_rows, rows, multiple)
    name = f"{reduction} linear loss"
    tensors = hidden, weight, bias, labels, loss_mask
    call = prepared(*tensors, given, name, sizes, sequence_parallel, per_sample=per_sample)
    return call.loss(of_kernels)


def linear_terms(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor | None,
    options: Options,
    sizes: Sizes,
    *,
    sequence_parallel: bool,
    into_main_grad: bool,
    metrics: bool,
) -> tuple[LossTerms, TokenMetrics | None]:
    """Unreduced losses with a graph, and with `metrics` the figures of `token_metrics`.

    into_main_grad: the gradient of the weight goes into its main_grad; see :mod:`.main_grad`.
    """
    tensors = hidden, weight, bias, labels, loss_mask
    name = "linear loss and metrics"
    call = prepared(*tensors, options, name, sizes, sequence_parallel, into_main_grad)
    return call.loss_and_metrics() if metrics else (call.terms(), None)

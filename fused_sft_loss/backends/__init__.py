"""The row kernels, once per way of running them.

A backend is a module with these functions. Logits are `[b, s, v]` with any row strides and a unit
last stride; N = b*s rows, batch-major; `math` is a :class:`~fused_sft_loss.rowmath.RowMath`. None
of them may synchronise with the host on an accelerator.

``row_targets(labels, loss_mask, cu_seqlens, shift, ignore_index, vocab_size) -> Targets``
    as :func:`fused_sft_loss.targets.row_targets`.
``row_stats(logits, target, weight, math, columns) -> [N, columns] fp32``
    in units of x, where z = math.unit * x: maximum, sum of exp(u) with u = math.unit * (x -
    maximum), target's x (0 when another shard owns it); with 4 columns also the sum of x; with 6
    also the argmax (global id) and the sum of u * exp(u). Rows with weight 0 are zeros and are not
    read.
``merge(gathered, target, weight, math)`` and ``merge_metrics(...)``
    as in :mod:`fused_sft_loss.shards`: statistics of all shards `[ranks, N, columns]` -> per-row
    results.
``row_grad(logits, normalizer, target, scale, math, out)``
    writes the gradient of scale * loss to `out`, which may be `logits` itself, in fp32 rounded
    once. `normalizer` `[N, 2]` is that of ``merge``. Rows with scale 0 are zeros and are not read.

Those of ``choose.ONE_READ`` also have what grad_in_forward needs:

``row_stats_grad(logits, target, weight, scale, math, out) -> (loss, normalizer)``
    row_stats, merge and row_grad, from one read of each row, for an unsharded vocabulary.
``row_grad(..., stored)``
    leaves rows alone whose `scale` is that in `stored`, bit for bit.
``row_rescale(grad, scale, stored, math)``
    multiplies the other rows of a gradient by scale / stored instead.
"""

"""The loss of hidden states and an output layer, without the logits: ``linear_sft_loss``.

The logits exist one tile at a time, and only for scored rows. ``two_passes.py`` computes each tile
twice: once for the statistics, once for the gradient. ``one_pass.py`` (grad_in_forward) computes it
once, and the gradient in forward.
"""

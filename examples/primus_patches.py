"""Primus' Megatron SFT trainer with this loss, without an edit of Primus.

Copy this file to primus/backends/megatron/patches/fused_sft_loss_patches.py: Primus imports all
*_patches.py there, and applies them before it trains. In the YAML set

    calculate_per_token_loss: true   # false, the default, is a mean of means
    enable_fused_linear_ce: false    # Primus' own fused loss; also no FUSED_LINEAR_CE=1
"""

from primus.core.patches import register_patch

from fused_sft_loss.megatron import fused_cross_entropy


@register_patch(
    "megatron.fused_sft_loss",
    backend="megatron",
    phase="before_train",
    description="Cross-entropy of the SFT trainer by fused_sft_loss",
)
def use_fused_sft_loss(context):
    from primus.backends.megatron.sft import forward_step as sft

    create = sft.create_sft_forward_step

    def create_fused_forward_step():
        step = create()

        def forward_step(data_iterator, model, return_schedule_plan=False):
            with fused_cross_entropy(model, inplace_backward=True):
                return step(data_iterator, model, return_schedule_plan)

        return forward_step

    sft.create_sft_forward_step = create_fused_forward_step  # train() imports it from there

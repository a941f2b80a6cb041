"""Run the real megatron-core on the CPU with gloo, without editing it.

    init(tp=2)                                    # in every rank, see bench.ranks.run_ranks
    cfg = config(num_layers=2, hidden_size=64)    # TransformerConfig for the initialised sizes
    model = build_model(cfg, vocab=1024, seq=64)  # GPTModel of this stage, logits sharded over TP

With a GPU the same calls use CUDA: the replacements below are installed only without a GPU.
"""

import os
import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .ranks import RankError, run_ranks

__all__ = ["CPUAttention", "RankError", "build_model", "config", "init", "layer_spec", "reset"]
__all__ += ["run_ranks", "sequence_shard", "zigzag_positions"]


class _CudaOnCpu(TorchFunctionMode):
    """Tensors that code creates on, moves to or pins for a CUDA device are on the CPU instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        device = kwargs.get("device")
        if isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


_stand_in = None


def use_cpu_for_cuda():
    """Let megatron-core run without CUDA for the rest of this process. Does nothing with CUDA.

    The schedules, sequence parallelism and the pipeline's messages always use the CUDA device, and
    no option changes that. So functions of torch.cuda are replaced.
    """
    global _stand_in
    if torch.cuda.is_available() or _stand_in is not None:
        return
    torch.cuda.current_device = lambda: torch.device("cpu")  # Megatron passes it on as device=...
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: None
    _stand_in = _CudaOnCpu()
    _stand_in.__enter__()


def init(tp=1, pp=1, cp=1):
    """Set up Megatron's tensor, pipeline and context groups; the remaining factor is data parallel.

    Uses the default process group if there is one, else makes a group of only this process.
    Returns megatron.core.parallel_state.
    """
    _hush()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    if not dist.is_initialized():
        store = os.path.join(tempfile.mkdtemp(prefix="megatron-cpu-"), "store")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    use_cpu_for_cuda()
    parallel_state.initialize_model_parallel(tp, pp, context_parallel_size=cp)
    # The inference tracker's fork() does nothing, so it needs no CUDA generator.
    initialize_rng_tracker(inference_rng_tracker=True)
    return parallel_state


def _hush():
    """Suppress Megatron's warnings about missing Transformer Engine, Apex and CUDA settings."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated")


def reset():
    """Undo `init`, so that the same process can call it again with other sizes."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized() and dist.get_world_size() == 1:
        dist.destroy_process_group()


def config(dtype=torch.float32, **options):
    """A small TransformerConfig without dropout, for the sizes given to `init`.

    `options` replace its defaults.
    """
    from megatron.core import parallel_state as ps
    from megatron.core.transformer.transformer_config import TransformerConfig

    defaults = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "tensor_model_parallel_size": ps.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": ps.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": ps.get_context_parallel_world_size(),
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "batch_p2p_comm": False,  # gloo has no batched send and receive
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
    }
    return TransformerConfig(**{**defaults, **options})


def build_model(cfg, vocab, seq, *, seed=0, float16_module=True, **options):
    """This rank's pipeline stage of a GPTModel. Without labels it returns logits [b, s, vocab/tp].

    A seed gives the same weights for every tensor-parallel size, because the full weight is drawn
    before the shard is taken. Another pipeline-parallel size gives other weights. A bf16 or fp16
    model is wrapped in Megatron's Float16Module, which returns fp32 logits unless it is called with
    fp32_output=False. float16_module=False omits the wrapper. `options` go to GPTModel.
    """
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.module import Float16Module

    torch.manual_seed(seed)
    model = GPTModel(
        cfg,
        layer_spec(cfg),
        vocab_size=vocab,
        max_sequence_length=seq,
        pre_process=ps.is_pipeline_first_stage(),
        post_process=ps.is_pipeline_last_stage(),
        parallel_output=True,
        **options,
    ).to(cfg.params_dtype)
    return Float16Module(cfg, model) if float16_module and (cfg.bf16 or cfg.fp16) else model


def layer_spec(cfg):
    """Megatron's local layer spec. With SP or CP, norm and attention are replaced for the CPU."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    spec = get_gpt_layer_local_spec()
    if not cfg.sequence_parallel and cfg.context_parallel_size == 1:
        return spec
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = _SequenceParallelNorm
    if cfg.context_parallel_size > 1:
        spec.submodules.self_attention.submodules.core_attention = CPUAttention
    layers = [spec] * get_num_layers_to_build(cfg)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_SequenceParallelNorm)


class _SequenceParallelNorm(torch.nn.LayerNorm):
    """LayerNorm for the local spec with sequence parallelism, which Megatron's own norm refuses.

    Marks its parameters so that finalize_model_grads sums their gradients over tensor parallelism.
    """

    def __init__(self, config, hidden_size, eps=1e-5, **_ignored):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


def zigzag_positions(seq, cp, rank):
    """Global positions [seq/cp] that rank `rank` of `cp` holds: chunks rank and 2*cp-1-rank."""
    if seq % (2 * cp):
        raise ValueError(f"expected a sequence length divisible by 2*cp = {2 * cp}, got {seq}")
    chunks = torch.arange(seq).chunk(2 * cp)
    return torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]])


def sequence_shard(tensor, cp, rank, dim=1):
    """A copy of the part of `tensor` ([b, seq, ...] for dim=1) that context rank `rank` holds."""
    return tensor.index_select(dim, zigzag_positions(tensor.size(dim), cp, rank))


class _GatherSequence(torch.autograd.Function):
    """Zigzag shards [n, ...] of all context ranks -> the whole sequence [n*cp, ...] in order."""

    @staticmethod
    def forward(ctx, shard, group):
        cp, n = group.size(), shard.size(0)
        parts = [shard.new_empty(shard.shape) for _ in range(cp)]
        dist.all_gather(parts, shard.contiguous(), group=group)
        whole = shard.new_empty(n * cp, *shard.shape[1:])
        for rank, part in enumerate(parts):
            whole[zigzag_positions(n * cp, cp, rank)] = part
        ctx.group, ctx.mine = group, zigzag_positions(n * cp, cp, group.rank())
        return whole

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.mine], None


class CPUAttention(torch.nn.Module):
    """Causal core attention for context parallelism. It gathers keys and values, but not queries.

    Megatron's own local attention refuses context parallelism.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **options):
        super().__init__()
        from megatron.core import parallel_state

        self.scale = options.get("softmax_scale")
        self.group = parallel_state.get_context_parallel_group()

    def forward(self, query, key, value, attention_mask=None, **_ignored):
        """query [s, b, heads, d], key, value [s, b, groups, d] -> [s, b, heads*d], s = seq/cp.

        attention_mask [b, 1, s, seq] bool, True where a position is hidden; None: causal.
        """
        s, b, heads, d = query.shape
        cp = self.group.size()
        key, value = (_GatherSequence.apply(x, self.group) for x in (key, value))
        here = zigzag_positions(s * cp, cp, self.group.rank())
        visible = here[:, None] >= torch.arange(s * cp)[None, :]
        if attention_mask is not None:
            visible = ~attention_mask
        out = F.scaled_dot_product_attention(
            *(x.permute(1, 2, 0, 3) for x in (query, key, value)),
            attn_mask=visible,
            scale=self.scale,
            enable_gqa=key.size(2) != heads,
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)

"""Trainers that compute log-probabilities of sharded logits: stand-ins, run in several processes.

Each run returns what the trainer sees, and the gradient of this rank's logits. Does not import
pytest, which would slow down the workers' start.
"""

import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from stand_ins import fake_modules

from bench.megatron_cpu import init

VOCAB, TEMPERATURE = 12, 0.7


def shard(whole, mpu):
    """(non-leaf logits of this rank, their leaf)."""
    size, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    leaf = whole.chunk(size, -1)[rank].contiguous().requires_grad_()
    return leaf * 1, leaf


# --- slime ----------------------------------------------------------------------------------------


def samples(seed=0):
    """(tokens, loss mask of the response, logits) of each sample; one has a prompt of one token."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length, response in ((7, 4), (6, 5), (5, 2)):
        tokens = torch.randint(1, VOCAB, (length,), generator=generator)
        mask = torch.ones(response, dtype=torch.int)
        mask[response // 2] = 0
        found.append((tokens, mask, torch.randn(length, VOCAB, generator=generator) * 2))
    return found


def zigzag(part, size, rank):
    """Two chunks of a padded sequence: number `rank` from the front and from the back."""
    if size == 1:
        return part
    chunk = -(-len(part) // (2 * size))
    padding = part.new_zeros(2 * size * chunk - len(part), *part.shape[1:])
    chunks = torch.cat([part, padding]).split(chunk)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def padded(parts, multiple=8):
    rows = torch.cat(parts)
    return torch.cat([rows, rows.new_zeros(-len(rows) % multiple, *rows.shape[1:])])


def in_rows(tokens, mask):
    """The values of a response, moved to the rows that predict them."""
    return F.pad(mask, (len(tokens) - len(mask) - 1, 1))


def slime_loss(snippet, tp, cp, per_token):
    """(loss, its log entry, gradient) of the documented loss function."""
    mpu = init(tp=tp, cp=cp)
    here = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()

    def slice_with_cp(part, pad_value):
        assert pad_value == 0
        return zigzag(part, *here)

    fake_modules({"slime.backends.megatron_utils.cp_utils": {"slice_with_cp": slice_with_cp}})
    data = samples()
    masks = [zigzag(in_rows(tokens, mask), *here) for tokens, mask, _ in data]
    inside = [zigzag(in_rows(tokens, torch.ones_like(mask)), *here) for tokens, mask, _ in data]

    def sum_of_sample_mean(values):
        total = 0
        parts = values.split([int(rows.sum()) for rows in inside])
        for part, mask, rows, (_, full, _) in zip(parts, masks, inside, data, strict=True):
            weight = 1 if per_token else 1 / max(int(full.sum()), 1)
            total = total + (part * mask[rows != 0]).sum() * weight
        return total

    batch = {
        "unconcat_tokens": [tokens for tokens, *_ in data],
        "loss_masks": [mask for _, mask, _ in data],
        "full_loss_masks": padded(masks)[None],
    }
    logits, leaf = shard(padded([zigzag(z, *here) for *_, z in data])[None], mpu)
    args = SimpleNamespace(allgather_cp=False, rollout_temperature=TEMPERATURE)
    loss, log = snippet.run({})["sft_loss"](args, batch, logits, sum_of_sample_mean)
    loss.backward()
    return loss.item(), log["loss"].item(), leaf.grad[0]


def slime_loss_in_float64(tp, cp, per_token):
    """(loss, [gradient of each rank]) by slime's definition: log-softmax of each response."""
    total, leaves = 0, []
    for tokens, mask, logits in samples():
        leaves.append(logits.double().requires_grad_())
        rows = leaves[-1][len(tokens) - len(mask) - 1 : -1] / TEMPERATURE
        losses = -rows.log_softmax(-1)[range(len(mask)), tokens[-len(mask) :]]
        total = total + (losses * mask).sum() / (1 if per_token else mask.sum())
    grads = torch.autograd.grad(total, leaves)
    of_ranks = []
    for rank in range(tp * cp):
        whole = padded([zigzag(grad, cp, rank // tp) for grad in grads])
        of_ranks.append(whole.chunk(tp, -1)[rank % tp])
    return total.item(), of_ranks


# --- rows of labels -------------------------------------------------------------------------------


def rows(*shape):
    """Logits, labels, temperatures, and upstream gradients of log-probabilities and entropies."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(*shape, VOCAB, generator=generator) * 2
    labels = torch.randint(0, VOCAB, shape, generator=generator)
    temperature = 0.5 + torch.rand(shape, generator=generator)
    return logits, labels, temperature, *torch.randn(2, *shape, generator=generator)


def in_float64(logits, labels, temperature, grad, grad_entropy):
    """(log-probabilities, entropies, gradient) by definition; zero where the temperature is 0."""
    used = temperature > 0
    leaf = torch.where(used[..., None], logits, 0.0).double().requires_grad_()
    log_p = (leaf / torch.where(used, temperature, 1.0)[..., None]).log_softmax(-1)
    log_probs = log_p.gather(-1, labels[..., None]).squeeze(-1) * used
    entropy = -(log_p.exp() * log_p).sum(-1) * used
    total = (log_probs * grad).sum() + (entropy * grad_entropy).sum()
    return log_probs.detach(), entropy.detach(), torch.autograd.grad(total, leaf)[0]


def backward(log_probs, grad, entropy=None, grad_entropy=None):
    total = (log_probs * grad).sum()
    if entropy is not None and entropy.requires_grad:
        total = total + (entropy * grad_entropy).sum()
    total.backward()


def slime_logprobs(snippet, with_entropy, with_entropy_grad):
    """(log-probabilities [t, 1], entropies, gradient), and what a keep mask leads to."""
    mpu = init(tp=2)
    name = "slime.backends.megatron_utils.loss"
    kept = {"calculate_log_probs_and_entropy": lambda *args, **kwargs: kwargs}
    fake_modules({name: kept})
    names = snippet.run({})
    names["install"](SimpleNamespace())
    function = names["slime_loss"].calculate_log_probs_and_entropy
    whole, labels, _, grad, grad_entropy = rows(9)
    logits, leaf = shard(whole, mpu)
    given = {"with_entropy": with_entropy, "with_entropy_grad": with_entropy_grad, "chunk_size": 4}
    group = mpu.get_tensor_model_parallel_group()
    log_probs, entropy = function(logits, labels, group, log_prob_keep_mask=None, **given)
    backward(log_probs[:, 0], grad, entropy, grad_entropy)
    passed_on = function(logits, labels, group, log_prob_keep_mask="a mask", **given)
    assert passed_on == {**given, "log_prob_keep_mask": "a mask"}
    entropy_grads = entropy is not None and entropy.requires_grad
    return (
        log_probs.detach(),
        None if entropy is None else entropy.detach(),
        leaf.grad,
        entropy_grads,
    )


def nemo_rl(snippet, chunk_size, inference_only):
    """(log-probabilities [b, s - 1], gradient or None) of NeMo-RL's caller of the two classes."""
    mpu = init(tp=2)
    fake_modules({"nemo_rl.distributed.model_utils": {}})
    model_utils = snippet.run({})["model_utils"]
    whole, tokens, _, grad, _ = rows(2, 6)
    logits, leaf = shard(whole, mpu)
    width, rank = logits.shape[-1], mpu.get_tensor_model_parallel_rank()
    target, group = tokens.roll(-1, -1), mpu.get_tensor_model_parallel_group()
    start_end = rank * width, (rank + 1) * width
    if chunk_size is None:
        found = model_utils.DistributedLogprob.apply(
            logits, target, *start_end, group, inference_only
        )
    else:
        found = model_utils.ChunkedDistributedLogprob.apply(
            logits, target, *start_end, chunk_size, group, inference_only
        )
    found = found.contiguous()[:, :-1]
    if inference_only:
        return found, None
    backward(found, grad[:, :-1])
    return found.detach(), leaf.grad


ENGINE = "verl.workers.engine.megatron.transformer_impl"
NOTHING = {"calculate_sum_pi_squared": False, "distillation_use_topk": False}
NOTHING |= {"distillation_only": False, "logits_processor_func": None, "batch": None}


class Engine:
    """verl's MegatronEngineWithLMHead: divides the logits, then calls functions of its module."""

    def _lm_head_logits_processor(self, logits, label, temperature, **options):
        if options["distillation_only"]:
            return "verl's own"
        function = sys.modules[ENGINE].vocab_parallel_log_probs_from_logits
        scaled = logits / temperature.clamp(min=1e-8).unsqueeze(-1)
        return {"log_probs": function(scaled, label)}


def verl_megatron(snippet, calculate_entropy, padding):
    """(results of the engine's method, gradient); the last rows are padding."""
    mpu = init(tp=2)
    fake_modules({ENGINE: {"MegatronEngineWithLMHead": Engine}})
    snippet.run({})
    whole, labels, temperature, grad, grad_entropy = padded_rows(padding)
    logits, leaf = shard(whole, mpu)
    options = {**NOTHING, "calculate_entropy": calculate_entropy, "data_format": "thd"}
    given = {"label": labels, "temperature": temperature}
    found = Engine()._lm_head_logits_processor(logits, **given, **options)
    backward(found["log_probs"], grad, found.get("entropy"), grad_entropy)
    if calculate_entropy:
        options["distillation_only"] = True
        assert Engine()._lm_head_logits_processor(logits, **given, **options) == "verl's own"
    return {name: value.detach() for name, value in found.items()}, leaf.grad


def padded_rows(padding):
    """`rows` of one packed sequence; in the last `padding` rows temperature is 0, logits NaN."""
    whole, labels, temperature, grad, grad_entropy = rows(1, 9)
    temperature[:, 9 - padding :] = 0
    whole[:, 9 - padding :] = torch.nan
    return whole, labels, temperature, grad, grad_entropy


def verl_fsdp(snippet, inplace_backward):
    """(log-probabilities [t], gradient) of the whole vocabulary."""
    fake_modules({"verl.workers.engine.fsdp.transformer_impl": {}})
    function = snippet.run({})["transformer_impl"].logprobs_from_logits
    leaf, labels, _, grad, _ = rows(9)
    logits = leaf.requires_grad_() * 1
    found = function(logits=logits, labels=labels, inplace_backward=inplace_backward)
    backward(found, grad)
    assert torch.equal(logits, leaf) == (not inplace_backward)
    return found.detach(), leaf.grad

"""Runs of Hugging Face's Trainer on tiny random models, for tests. transformers is optional."""

import importlib.util
import tempfile

import pytest
import torch

from csrc.toolchains import without

VOCAB, SEQ, BATCH, ACCUMULATED, STEPS = 67, 9, 2, 2, 2


def _absent():
    """Why the tests that need it are skipped, or ""."""
    if reason := without.absent("transformers"):
        return f"transformers is absent: {reason}"
    names = [name for name in ("transformers", "accelerate") if not importlib.util.find_spec(name)]
    return f"no {' and '.join(names)}: pip install 'fused_sft_loss[hf]'" if names else ""


ABSENT = _absent()
needs_transformers = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)


def causal():
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def experts():
    from transformers import MixtralConfig, MixtralForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32}
    router = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.3}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, **router))


def encoder_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": VOCAB, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2}
    ends = {"decoder_start_token_id": 0, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(**sizes, **ends, num_layers=1))


def masked():
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(
        BertConfig(**sizes, **dropout, num_hidden_layers=1, num_attention_heads=2)
    )


def examples(scored=range(1, SEQ)):
    """Token ids, and labels whose first part is -100: the micro-batches score unlike numbers."""
    made, counts = [], list(scored)
    for number in range(BATCH * ACCUMULATED * STEPS):
        tokens = torch.randint(1, VOCAB, (SEQ,))
        labels = tokens.clone()
        labels[: SEQ - counts[number % len(counts)]] = -100
        made.append({"input_ids": tokens, "labels": labels})
    return made


def training_arguments(folder, **more):
    from transformers import TrainingArguments

    given = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": STEPS}
    given |= {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATED}
    given |= {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(folder, **given, **more)


def train(model, data, compute_loss_func=None, **arguments):
    """(losses of the micro-batches, gradients of each optimizer step, losses of an evaluation).

    SGD changes the weights, so every step depends on the gradients before it.
    """
    from transformers import Trainer, TrainerCallback

    losses, steps = [], []

    class Watched(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(data)

        def training_step(self, *given, **more):
            losses.append(super().training_step(*given, **more))
            return losses[-1]

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            named = model.named_parameters()
            steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    with tempfile.TemporaryDirectory() as folder:
        options = {"train_dataset": data, "callbacks": [Gradients()]}
        options["compute_loss_func"] = compute_loss_func
        trainer = Watched(model, training_arguments(folder, **arguments), **options)
        trainer.train()
        evaluated = trainer.evaluate(data)["eval_loss"]
    return torch.stack(losses), steps, evaluated

"""Turn conversations into token ids and masks, with the Tekken vocabulary of 131,072 tokens."""

import itertools
import logging
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import UserError, need


class Tekken:
    """The tokenizer of a file in the mistral-common package, and its instruction format.

    <s> [SYSTEM_PROMPT] text [/SYSTEM_PROMPT] [INST] text [/INST] text </s> [INST] ...
    """

    def __init__(self):
        logging.getLogger("mistral_common").setLevel(logging.ERROR)
        package = need("mistral_common", "mistral-common")
        tekken = need("mistral_common.tokens.tokenizers.tekken", "mistral-common")
        found = sorted((Path(package.__file__).parent / "data").glob("tekken_*.json"))
        if not found:
            raise UserError(
                f"expected a tekken_*.json inside mistral-common, got none in version "
                f"{package.__version__}; install mistral-common 1.5 or later"
            )
        self.file = found[-1].name
        self._tekken = tekken.Tekkenizer.from_file(found[-1])
        self.vocab, self.pad = self._tekken.n_words, self._tekken.pad_id
        names = ("SYSTEM_PROMPT", "/SYSTEM_PROMPT", "INST", "/INST")
        self._control = {name: self._tekken.get_special_token(f"[{name}]") for name in names}

    def encode(self, conversation):
        """(ids, scored), lists of one length. The assistant's tokens and its </s> are scored."""
        ids, scored = [self._tekken.bos_id], [0]
        for role, content in conversation:
            text = self._tekken.encode(content, bos=False, eos=False)
            if role == "assistant":
                turn = [*text, self._tekken.eos_id]
            else:
                name = "INST" if role == "user" else "SYSTEM_PROMPT"
                turn = [self._control[name], *text, self._control[f"/{name}"]]
            # An empty turn of the assistant is not scored: its </s> has nothing to teach.
            ids += turn
            scored += [int(role == "assistant" and bool(text))] * len(turn)
        return ids, scored


@dataclass
class Batch:
    """One micro-batch. Padding is at the end of a row and never scored."""

    tokens: torch.Tensor  # [b, s] int64
    loss_mask: torch.Tensor  # [b, s] fp32, 0 or 1, aligned with tokens
    used: int  # tokens that are not padding

    @property
    def scored(self):
        """The number of scored predictions. The first token of a row is never predicted."""
        return int(self.loss_mask[:, 1:].sum())

    def for_megatron(self, device="cpu"):
        """The dict that a forward_step's get_batch returns."""
        tokens = self.tokens.to(device)
        positions = torch.arange(tokens.size(1), device=device).expand_as(tokens).contiguous()
        return {
            "tokens": tokens,
            "position_ids": positions,
            "attention_mask": None,  # the model's own causal mask; padding is last
            "labels": tokens,
            "loss_mask": self.loss_mask.to(device),
        }

    def reversed(self):
        """The batch with its rows in reverse order."""
        return replace(self, tokens=self.tokens.flip(0), loss_mask=self.loss_mask.flip(0))

    def within(self, vocab):
        """The batch with ids modulo a smaller vocabulary. The amount of work stays the same."""
        return replace(self, tokens=self.tokens % vocab)


def make_batches(conversations, tokenizer, steps, size, length, seed=0):
    """`steps` batches [size, length] of encoded conversations, shuffled by `seed`.

    Conversations are cut at `length`. Those without a scored token before the cut are left out. If
    there are too few conversations, they are repeated.

    Returns (batches, conversations used, conversations left out).
    """
    examples, left_out = [], 0
    for conversation in conversations:
        ids, scored = tokenizer.encode(conversation)
        if any(scored[1:length]):
            examples.append((ids[:length], scored[:length]))
        else:
            left_out += 1
        if len(examples) == steps * size:
            break
    if not examples:
        raise UserError(
            f"expected conversations whose response begins within --seq-length {length} tokens, "
            f"got {left_out} that begin later; raise --seq-length"
        )
    random.Random(seed).shuffle(examples)
    endless = itertools.cycle(examples)
    batches = [
        _batch(list(itertools.islice(endless, size)), length, tokenizer.pad) for _ in range(steps)
    ]
    return batches, len(examples), left_out


def _batch(examples, length, pad):
    tokens = torch.full((len(examples), length), pad, dtype=torch.int64)
    loss_mask = torch.zeros(len(examples), length)
    for row, (ids, scored) in enumerate(examples):
        tokens[row, : len(ids)] = torch.tensor(ids)
        loss_mask[row, : len(ids)] = torch.tensor(scored, dtype=torch.float32)
    return Batch(tokens, loss_mask, sum(len(ids) for ids, _ in examples))

"""A training step in plain PyTorch: python -m examples.pytorch_step"""

import torch

import fused_sft_loss as fsl

VOCAB, SEQ, BATCH, PROMPT = 32000, 64, 4, 40


def make_model():
    return torch.nn.Sequential(torch.nn.Embedding(VOCAB, 64), torch.nn.Linear(64, VOCAB))


def make_batch():
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ))
    loss_mask = torch.ones(BATCH, SEQ, dtype=torch.bool)
    loss_mask[:, :PROMPT] = False  # only the response is scored
    return tokens, loss_mask


def training_step(model, optimizer, tokens, loss_mask):
    optimizer.zero_grad()
    logits = model(tokens)  # [b, s, v]
    loss = fsl.sft_loss(logits, tokens, loss_mask, inplace_backward=True)
    loss.backward()  # overwrites the logits with their gradient: do not read them after this
    optimizer.step()
    return loss.detach()


def main(steps=5):
    torch.manual_seed(0)
    model, batch = make_model().bfloat16(), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return [training_step(model, optimizer, *batch).item() for _ in range(steps)]


if __name__ == "__main__":
    print(*(f"{loss:.3f}" for loss in main()))

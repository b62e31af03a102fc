"""DPO in one screen on the kernels alone: no logits in memory, and no second model.

The reference is the same weights with the adapter off (rows with id -1), so one pass over
[chosen, rejected, chosen, rejected] gives policy and reference.

    python examples/own_dpo_loop.py

Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_model import pairs, tiny_model

import hydra_kernels.peft
from hydra_kernels.nn import LMHead


def main(steps: int = 12, beta: float = 0.1) -> list[float]:
    """The loss of each step; the first is log 2, because the adapter starts at zero."""
    base, tokenizer = tiny_model()
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    hydra_kernels.peft.fuse(model)
    head, trunk = LMHead.from_model(model), model.get_base_model().model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    rows = pairs(16)
    answers = [tokenizer(row[side])["input_ids"] for side in ("chosen", "rejected") for row in rows]
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows] * 2
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    tokens = torch.full((32, longest), tokenizer.pad_token_id)
    targets = torch.full((32, longest), -100)  # of the answers' tokens alone
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        targets[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    attention = tokens != tokenizer.pad_token_id
    twice = {"input_ids": tokens.repeat(2, 1), "attention_mask": attention.repeat(2, 1)}
    ids = torch.tensor([0] * 32 + [-1] * 32)  # policy, and the same rows with the adapter off

    history = []
    for step in range(1, steps + 1):
        with hydra_kernels.peft.adapter_ids(model, ids):
            hidden = trunk(**twice).last_hidden_state[:, :-1]
        logprobs = head.logprob(hidden, targets[:, 1:].repeat(2, 1)).logprobs.sum(-1)
        policy, reference = logprobs[:32], logprobs[32:].detach()
        gain = (policy - reference).view(2, 16)  # chosen, rejected
        loss = -F.logsigmoid(beta * (gain[0] - gain[1])).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
        print(f"step {step:2}: loss {history[-1]:.4f}")
    return history


if __name__ == "__main__":
    main()

"""A PPO loop of your own on HydraModel and the ops: one model, four roles, in one screen.

    python examples/own_ppo_loop.py

``hydra_rlhf.ppo.train`` does the same with microbatches, checkpoints, faults and processes.
"""

from __future__ import annotations

import torch
from tiny_model import pairs, tiny_model

import hydra_kernels
from hydra_rlhf import HydraModel, RolloutEngine
from hydra_rlhf.model import default_lora_config
from hydra_rlhf.rollout import Sampling, encode_prompts


def main(steps: int = 6, epochs: int = 2) -> list[float]:
    """Mean score of each step."""
    causal_lm, tokenizer = tiny_model()
    model = HydraModel(
        causal_lm,
        adapters=("actor", "critic"),
        lora_config=default_lora_config(causal_lm, r=8, lora_alpha=16),
    )
    trained = [p for p in model.parameters() if p.requires_grad]  # both adapters, and value_head
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    sampling = Sampling(
        response_length=12,
        temperature=1.0,
        stop_ids=(tokenizer.eos_token_id,),
        pad_id=tokenizer.pad_token_id,
    )
    ids, mask = encode_prompts(tokenizer, [row["prompt"] for row in pairs(24)])
    sample = RolloutEngine(model)

    history = []
    for step in range(1, steps + 1):
        rollout = sample(model, ids, mask, sampling)
        batch = (rollout.query_responses, rollout.attention_mask, rollout.response_mask)
        counts = rollout.response_mask
        with torch.no_grad():
            # One call, three passes: actor, critic, and one with adapters off for the reference.
            old = model.score(*batch, roles=("actor", "critic", "reference"))
        even = (rollout.query_responses[:, ids.shape[1] :] % 2 == 0) & counts
        scores = even.sum(-1) / counts.sum(-1)  # your reward: the share of even token ids
        rewards = hydra_kernels.kl_rewards(
            scores, old.logprobs, old.ref_logprobs, counts, kl_coef=0.02
        )
        advantages, returns = hydra_kernels.gae(rewards, old.values, counts)
        advantages = hydra_kernels.masked_whiten(advantages, counts)
        for _ in range(epochs):
            new = model.score(*batch, roles=("actor", "critic"))
            loss = hydra_kernels.ppo_loss(
                new.logprobs,
                new.values,
                old_logprobs=old.logprobs,
                old_values=old.values,
                advantages=advantages,
                returns=returns,
                mask=counts,
            )
            loss.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        history.append(scores.mean().item())
        print(
            f"step {step}: score {history[-1]:.3f}, ratio {loss.ratio:.3f}, kl {loss.approx_kl:.4f}"
        )
    return history


if __name__ == "__main__":
    main()

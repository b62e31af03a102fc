"""Gradient surgery for a joint adapter, as the alignment study tries it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hydra_rlhf import update
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.methods import MethodModels


@contextlib.contextmanager
def surgery() -> Iterator[None]:
    """What of the value loss's gradient opposes the policy's in the joint adapter is taken from it.

    ``g_v - min(0, g_v . g_p) / |g_p|^2 g_p``: the projection of Yu et al. 2020, arXiv:2001.06782,
    algorithm 1, of one of the two gradients. For one microbatch a minibatch, as the study has it.
    """
    whole = update.ppo_losses

    def projected(
        config: PPOConfig, models: MethodModels, *rest: Any
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        joint, head = models.actor_parameters(), models.critic_parameters()
        for _, figures in whole(config, models, *rest):
            policy = torch.autograd.grad(figures["policy_loss"], joint, retain_graph=True)
            value = torch.autograd.grad(config.vf_coef * figures["value_loss"], [*joint, *head])
            dot = sum((p * v).sum() for p, v in zip(policy, value, strict=False))
            square = sum(p.square().sum() for p in policy)
            share = (dot.clamp(max=0.0) / square.clamp(min=1e-30)).detach()
            wanted = [v + (1.0 - share) * p for p, v in zip(policy, value, strict=False)]
            wanted += value[len(joint) :]
            # A loss whose gradient is the wanted one, for the loop to send back as any other.
            sums = [(p * w).sum() for p, w in zip([*joint, *head], wanted, strict=True)]
            yield torch.stack(sums).sum(), figures

    update.ppo_losses = projected
    try:
        yield
    finally:
        update.ppo_losses = whole

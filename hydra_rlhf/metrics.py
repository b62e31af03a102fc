"""A step's figures under TRL's names, and what they say when something is wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hydra_rlhf.config import PPOConfig

TRL_NAMES = {
    "policy_loss": "loss/policy_avg",
    "value_loss": "loss/value_avg",
    "entropy": "policy/entropy_avg",
    "approx_kl": "policy/approxkl_avg",
    "clipfrac": "policy/clipfrac_avg",
    "vf_clipfrac": "val/clipfrac_avg",
    "ratio": "val/ratio",
    "grad_norm/actor": "policy/grad_norm",
    "grad_norm/critic": "val/grad_norm",
}


def update_metrics(history: list[dict[str, Tensor]], skipped: int) -> dict[str, float]:
    """Means over the optimizer steps of a rollout, under TRL's names."""
    metrics: dict[str, Tensor] = {}
    for name, trl_name in TRL_NAMES.items():
        values = [found[name] for found in history if name in found]
        if values:
            metrics[trl_name] = torch.stack(values).mean()
    ratios = [found["ratio"] for found in history if "ratio" in found]
    if ratios:
        metrics["val/ratio_var"] = torch.stack(ratios).var(correction=0)
        metrics["val/ratio_max"] = torch.stack([f["ratio_max"] for f in history]).max()
        metrics["val/ratio_first"] = ratios[0]
    if history:
        metrics["lr"] = history[-1]["lr/actor"]
        metrics["lr/critic"] = history[-1]["lr/critic"]
    return to_floats(metrics) | {"policy/updates_skipped": float(skipped)}


def to_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    """One transfer from the device for all of them."""
    if not metrics:
        return {}
    device = next(iter(metrics.values())).device
    values = torch.stack([value.detach().double().to(device) for value in metrics.values()])
    return dict(zip(metrics, values.tolist(), strict=True))


def explained_variance(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """``1 - Var(returns - values) / Var(returns)`` over the mask; 0 for constant returns.

    ``reduce`` sums over the processes that share the batch.
    """

    def variance(x: Tensor) -> Tensor:
        count, total = reduce(torch.stack([mask.sum().double(), x.sum()]))
        mean = total / count.clamp(min=1)
        return reduce(torch.where(mask, x - mean, 0.0).square().sum()) / count.clamp(min=1)

    kept_returns = torch.where(mask, returns, 0.0).double()
    kept_errors = torch.where(mask, returns - values, 0.0).double()
    spread = variance(kept_returns)
    share = variance(kept_errors) / spread.clamp(min=1e-12)
    return torch.where(spread > 0, 1.0 - share, 0.0)


def diagnose(config: PPOConfig, metrics: dict[str, float]) -> list[str]:
    """What looks wrong in a step, each with its likely cause."""
    found = []
    filters = "; ".join(config.off_policy_reasons())
    if metrics["objective/kl"] < 0 and filters:
        found.append(f"objective/kl is negative because {filters}: the sampler is not the policy")
    elif metrics["objective/kl"] < -1.0:
        found.append(
            "objective/kl is far below 0: k1 is negative only by chance of the sample; look for "
            "log-probabilities of actor and reference under different temperatures or masks"
        )
    if metrics.get("val/ratio_max", 1.0) > 10.0:
        found.append(
            "a token's probability ratio passed 10 within one rollout: the learning rate is too "
            "high, or old log-probabilities come from another distribution (set target_kl)"
        )
    first = metrics.get("val/ratio_first", 1.0)
    if abs(first - 1.0) > 0.01:
        found.append(
            f"the first minibatch starts at ratio {first:.4g}, not 1: its log-probabilities and "
            "the old ones are taken under different precision, dropout, positions or temperature"
        )
    difference = metrics.get("val/rollout_logprob_diff", 0.0)
    if difference > config.rollout_logprobs_tolerance:
        found.append(f"rollout and forward log-probabilities differ by {difference:.3g} nats")
    if metrics["val/num_eos_tokens"] == 0:
        found.append(
            "no response ended within response_length: the stop token is never sampled, or "
            "response_length is too short"
        )
    return found

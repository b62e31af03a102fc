"""Clipped PPO loss in plain PyTorch: the definition every kernel is tested against."""

import torch
from torch import Tensor

from hydra_kernels.backends.token_ops import state_dtype

# As kLogRatioLimit of csrc/include/hydra/ppo_loss.h: finite inputs must give finite losses.
LOG_RATIO_LIMIT = 60.0


def ppo_loss(
    logprobs: Tensor | None,  # (B, T), as are all tensors below
    values: Tensor | None,
    old_logprobs: Tensor | None,
    old_values: Tensor | None,
    advantages: Tensor | None,
    returns: Tensor | None,
    mask: Tensor,  # bool
    cliprange: float,
    cliprange_value: float,
    vf_coef: float,
    entropy: Tensor | None,
    ent_coef: float,
    kl: Tensor | None,
    kl_coef: float,
) -> tuple[Tensor, ...]:
    dtype = state_dtype(
        logprobs, values, old_logprobs, old_values, advantages, returns, entropy, kl
    )
    count = mask.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum(dtype=dtype) / count

    zero = torch.zeros((), dtype=dtype, device=mask.device)
    policy_loss = value_loss = approx_kl = clipfrac = vf_clipfrac = mean_ratio = zero
    if logprobs is not None:
        # Masked positions may hold anything, inf included: zeroed before exp, they make no NaN.
        log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
        log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ratio = torch.exp(log_ratio)
        gain = torch.where(mask, advantages, 0.0)
        unclipped_loss = -gain * ratio
        clipped_loss = -gain * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
        clipped = clipped_loss > unclipped_loss
        policy_loss = mean(torch.where(clipped, clipped_loss, unclipped_loss))
        approx_kl = mean((ratio - 1.0) - log_ratio).detach()
        clipfrac = mean(clipped.to(dtype))
        mean_ratio = mean(ratio).detach()
    if values is not None:
        v = torch.where(mask, values, 0.0)
        v_old = torch.where(mask, old_values, 0.0)
        target = torch.where(mask, returns, 0.0)
        unclipped_error = (v - target) ** 2
        v_clipped = torch.clamp(v, v_old - cliprange_value, v_old + cliprange_value)
        clipped_error = (v_clipped - target) ** 2
        v_is_clipped = clipped_error > unclipped_error
        value_loss = 0.5 * mean(torch.where(v_is_clipped, clipped_error, unclipped_error))
        vf_clipfrac = mean(v_is_clipped.to(dtype))
    mean_entropy = zero if entropy is None else mean(entropy)
    mean_kl = zero if kl is None else mean(kl)
    loss = policy_loss + vf_coef * value_loss - ent_coef * mean_entropy + kl_coef * mean_kl
    return (
        loss,
        policy_loss,
        value_loss,
        mean_entropy,
        mean_kl,
        approx_kl,
        clipfrac,
        vf_clipfrac,
        mean_ratio,
    )

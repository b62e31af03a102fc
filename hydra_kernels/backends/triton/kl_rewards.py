"""Per-token rewards in Triton, in one launch; rows and their blocks are independent programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra_kernels.backends import launch, registry
from hydra_kernels.backends.token_ops import ESTIMATORS, float32_only
from hydra_kernels.backends.triton import runtime

BLOCK = 1024
LOG_RATIO_LIMIT = tl.constexpr(60.0)  # kKLLogRatioLimit of csrc/include/hydra/kl.h


@triton.jit
def exp_minus_1_minus(d):
    """exp(d) - 1 - d, by its Taylor series where the terms cancel; as in kl.h."""
    p = 2.0876757e-9
    p = p * d + 2.5052108e-8
    p = p * d + 2.7557319e-7
    p = p * d + 2.7557319e-6
    p = p * d + 2.4801587e-5
    p = p * d + 1.9841270e-4
    p = p * d + 1.3888889e-3
    p = p * d + 8.3333333e-3
    p = p * d + 4.1666667e-2
    p = p * d + 1.6666667e-1
    p = p * d + 0.5
    direct = (tl.exp(tl.where(d > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, d)) - 1.0) - d
    return tl.where(tl.abs(d) < 1.0, p * d * d, direct)


@triton.jit
def kl_rewards_fwd_kernel(
    scores,
    logprobs,  # the divergence itself for estimator 3, "exact"
    ref_logprobs,
    mask,
    rewards,
    T,
    kl_coef,
    ESTIMATOR: tl.constexpr,  # index in ESTIMATORS
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_start = row * T
    offs_t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs_t < T
    at = row_start + offs_t
    keep = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    # Selected after the loads, as in ppo_loss.py: then they are of 16 bytes.
    logprob = tl.where(keep, tl.load(logprobs + at, mask=inside), 0.0)
    if ESTIMATOR == 3:
        kl = logprob
    else:
        log_ratio = tl.where(keep, tl.load(ref_logprobs + at, mask=inside), 0.0) - logprob
        if ESTIMATOR == 0:
            kl = -log_ratio
        elif ESTIMATOR == 1:
            kl = 0.5 * log_ratio * log_ratio
        else:
            kl = exp_minus_1_minus(log_ratio)
    reward = tl.where(keep, -kl_coef * kl, 0.0)

    last = tl.max(tl.where(keep, offs_t, -1))
    if last >= 0:
        # Whether a token right of this block counts; the first block looked at mostly tells.
        right = tl.zeros([], dtype=tl.int32)
        start = tl.program_id(1) * BLOCK + BLOCK
        while (start < T) & (right == 0):
            ahead = start + tl.arange(0, BLOCK)
            flags = tl.load(mask + row_start + ahead, mask=ahead < T, other=0)
            right = tl.max(flags.to(tl.int32))
            start += BLOCK
        if right == 0:
            reward += tl.where(offs_t == last, tl.load(scores + row), 0.0)
    tl.store(rewards + at, reward, mask=inside)


def fwd(
    scores: Tensor,  # (B,) float32, contiguous, as are all tensors below
    logprobs: Tensor | None,  # (B, T)
    ref_logprobs: Tensor | None,  # (B, T)
    mask: Tensor,  # (B, T) bool
    kl_coef: float,
    estimator: str,
    kl: Tensor | None,  # (B, T)
) -> Tensor:
    B, T = mask.shape
    rewards = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    if mask.numel() == 0:
        return rewards
    block = min(BLOCK, triton.next_power_of_2(T))
    with launch.on_device(mask):
        kl_rewards_fwd_kernel[(B, triton.cdiv(T, block))](
            scores,
            kl if estimator == "exact" else logprobs,
            ref_logprobs,
            mask.view(torch.uint8),
            rewards,
            T,
            kl_coef,
            ESTIMATOR=ESTIMATORS.index(estimator),
            BLOCK=block,
            num_warps=4,
        )
    return rewards


def aot_signatures() -> Iterator[tuple[Any, dict[str, str | None], dict[str, Any], dict[str, Any]]]:
    """The kernel with the cheapest and the dearest estimator, for scripts/compile_check."""
    names = ["scores", "logprobs", "ref_logprobs", "rewards"]
    signature: dict[str, str | None] = {name: "*fp32:16" for name in names}
    signature |= {"mask": "*u8:16", "T": "i32:16", "kl_coef": "fp32"}
    for estimator in (0, 2):
        label = ESTIMATORS[estimator]
        constexprs = {"ESTIMATOR": estimator, "BLOCK": BLOCK}
        options = {"num_warps": 4, "label": label, "expects": ("wide_loads",)}
        yield kl_rewards_fwd_kernel, signature, constexprs, options


registry.register(
    "kl_rewards",
    "triton",
    registry.Kernel(fwd, None, float32_only(runtime.wrong_device), missing=runtime.missing),
)

"""Clipped PPO loss in Triton: statistics and gradients of every token in one launch.

Each program writes the sums of its tokens; the one that finishes last, found by an atomic ticket,
adds them up in their order. The ticket is the only atomic, and it decides who adds, not in which
order: the result is the same every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra_kernels.backends import launch, registry, tuning
from hydra_kernels.backends.token_ops import PPOInputs, PPOKernel, float32_only
from hydra_kernels.backends.triton import runtime

# Generic default first; see hydra_kernels/backends/tuning.py.
CONFIGS: tuple[dict[str, int], ...] = (
    {"BLOCK": 1024, "num_warps": 4},
    {"BLOCK": 512, "num_warps": 4},
    {"BLOCK": 2048, "num_warps": 8},
)
NUM_SUMS = 9  # as PPOSum in csrc/include/hydra/ppo_loss.h, in its order
LOG_RATIO_LIMIT = tl.constexpr(60.0)


@triton.jit
def ppo_loss_fwd_kernel(
    logprobs,
    values,
    old_logprobs,
    old_values,
    advantages,
    returns,
    entropy,
    kl,
    mask,
    partial,  # (num_blocks, 16) float32, columns in the order of PPOSum
    ticket,  # (1,) int32, 0 before and after
    stats,  # (10,) float32
    dlogprobs,
    dvalues,
    num_tokens,
    cliprange,
    cliprange_value,
    vf_coef,
    ent_coef,
    kl_coef,
    HAS_POLICY: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_KL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTIAL: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    num_blocks = tl.num_programs(0)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    inside = offs < num_tokens
    keep = inside & (tl.load(mask + offs, mask=inside, other=0) != 0)
    sums = partial + block * 16
    tl.store(sums + 8, tl.sum(keep.to(tl.float32)))
    if HAS_POLICY:
        # Selected after the load: a load masked by what does not come in runs of four tokens is
        # one of 4 bytes, not of 16.
        logprob = tl.where(keep, tl.load(logprobs + offs, mask=inside), 0.0)
        old_logprob = tl.where(keep, tl.load(old_logprobs + offs, mask=inside), 0.0)
        advantage = tl.where(keep, tl.load(advantages + offs, mask=inside), 0.0)
        log_ratio = logprob - old_logprob
        cut = tl.abs(log_ratio) > LOG_RATIO_LIMIT
        log_ratio = tl.where(log_ratio > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, log_ratio)
        log_ratio = tl.where(log_ratio < -LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT, log_ratio)
        ratio = tl.exp(log_ratio)
        clamped = tl.where(ratio < 1.0 - cliprange, 1.0 - cliprange, ratio)
        clamped = tl.where(ratio > 1.0 + cliprange, 1.0 + cliprange, clamped)
        unclipped_loss = -advantage * ratio
        clipped_loss = -advantage * clamped
        clipped = clipped_loss > unclipped_loss
        dlogprob = tl.where(clipped | cut, 0.0, unclipped_loss)
        tl.store(dlogprobs + offs, dlogprob, mask=inside)
        tl.store(sums + 0, tl.sum(tl.where(clipped, clipped_loss, unclipped_loss)))
        tl.store(sums + 4, tl.sum((ratio - 1.0) - log_ratio))
        tl.store(sums + 5, tl.sum(clipped.to(tl.float32)))
        tl.store(sums + 7, tl.sum(tl.where(keep, ratio, 0.0)))
    else:
        tl.store(sums + 0, 0.0)
        tl.store(sums + 4, 0.0)
        tl.store(sums + 5, 0.0)
        tl.store(sums + 7, 0.0)
    if HAS_VALUE:
        value = tl.where(keep, tl.load(values + offs, mask=inside), 0.0)
        old_value = tl.where(keep, tl.load(old_values + offs, mask=inside), 0.0)
        target = tl.where(keep, tl.load(returns + offs, mask=inside), 0.0)
        low = old_value - cliprange_value
        high = old_value + cliprange_value
        moved = tl.where(value < low, low, value)
        moved = tl.where(value > high, high, moved)
        error = value - target
        moved_error = moved - target
        larger = moved_error * moved_error > error * error
        tl.store(dvalues + offs, tl.where(larger, 0.0, error), mask=inside)
        squared = tl.where(larger, moved_error * moved_error, error * error)
        tl.store(sums + 1, 0.5 * tl.sum(squared))
        tl.store(sums + 6, tl.sum(larger.to(tl.float32)))
    else:
        tl.store(sums + 1, 0.0)
        tl.store(sums + 6, 0.0)
    if HAS_ENTROPY:
        tl.store(sums + 2, tl.sum(tl.where(keep, tl.load(entropy + offs, mask=inside), 0.0)))
    else:
        tl.store(sums + 2, 0.0)
    if HAS_KL:
        tl.store(sums + 3, tl.sum(tl.where(keep, tl.load(kl + offs, mask=inside), 0.0)))
    else:
        tl.store(sums + 3, 0.0)

    # Every thread's stores come before the ticket; acq_rel publishes them to the last program.
    tl.debug_barrier()
    mine = tl.atomic_add(ticket, 1, sem="acq_rel")
    if mine == num_blocks - 1:
        columns = tl.arange(0, 16)
        total = tl.zeros((16,), dtype=tl.float32)
        for start in range(0, num_blocks, BLOCK_PARTIAL):
            rows = start + tl.arange(0, BLOCK_PARTIAL)
            part = tl.load(
                partial + rows[:, None] * 16 + columns[None, :],
                mask=(rows[:, None] < num_blocks) & (columns[None, :] < 9),
                other=0.0,
                cache_modifier=".cg",  # other programs wrote these: not from the first-level cache
            )
            total += tl.sum(part, axis=0)
        count = tl.sum(tl.where(columns == 8, total, 0.0))
        share = 1.0 / tl.maximum(count, 1.0)
        mean = total * share
        # stats[1:9] are the means in the order of PPOSum; its slot 8, the count, becomes 1 / count.
        tl.store(stats + 1 + columns, tl.where(columns == 8, share, mean), mask=columns < 9)
        weight = tl.where(columns == 0, 1.0, 0.0) + tl.where(columns == 1, vf_coef, 0.0)
        weight += tl.where(columns == 2, -ent_coef, 0.0) + tl.where(columns == 3, kl_coef, 0.0)
        tl.store(stats, tl.sum(weight * mean))
        tl.store(ticket, 0)


def fwd(inputs: PPOInputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns stats (10,), d policy loss / d logprobs and d value loss / d values per token."""
    mask = inputs.mask
    stats = mask.new_empty(10, dtype=torch.float32)
    dlogprobs = None if inputs.logprobs is None else torch.empty_like(inputs.logprobs)
    dvalues = None if inputs.values is None else torch.empty_like(inputs.values)

    def run(config: tuning.Config) -> tuning.Outputs:
        # One block where there are no tokens: it writes the zeros.
        num_blocks = max(1, triton.cdiv(mask.numel(), config["BLOCK"]))
        partial = mask.new_empty((num_blocks, 16), dtype=torch.float32)
        with launch.on_device(mask):
            ppo_loss_fwd_kernel[(num_blocks,)](
                *inputs.tensors[:8],
                mask.view(torch.uint8),
                partial,
                launch.ticket(mask.device),
                stats,
                dlogprobs,
                dvalues,
                mask.numel(),
                *inputs.coefs,
                HAS_POLICY=inputs.logprobs is not None,
                HAS_VALUE=inputs.values is not None,
                HAS_ENTROPY=inputs.entropy is not None,
                HAS_KL=inputs.kl is not None,
                BLOCK_PARTIAL=64,
                **config,
            )
        return stats, dlogprobs, dvalues

    run(tuning.choose("ppo_loss_fwd", mask, {"tokens": mask.numel()}, CONFIGS, run))
    return stats, dlogprobs, dvalues


def aot_signatures() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """The kernel as it is launched for a policy and a value function, for scripts/compile_check."""
    names = ["logprobs", "values", "old_logprobs", "old_values", "advantages", "returns"]
    signature = {name: "*fp32:16" for name in [*names, "entropy", "kl"]}
    signature |= {"mask": "*u8:16", "partial": "*fp32:16", "ticket": "*i32:16", "stats": "*fp32:16"}
    signature |= {"dlogprobs": "*fp32:16", "dvalues": "*fp32:16", "num_tokens": "i32:16"}
    signature |= dict.fromkeys(
        ["cliprange", "cliprange_value", "vf_coef", "ent_coef", "kl_coef"], "fp32"
    )
    flags = ("HAS_POLICY", "HAS_VALUE", "HAS_ENTROPY", "HAS_KL")
    constexprs: dict[str, Any] = dict.fromkeys(flags, True)
    for config in CONFIGS:
        options = {"num_warps": config["num_warps"], "expects": ("wide_loads",)}
        options["label"] = f"BLOCK={config['BLOCK']}"
        sizes = {"BLOCK": config["BLOCK"], "BLOCK_PARTIAL": 64}
        yield ppo_loss_fwd_kernel, signature, constexprs | sizes, options


registry.register(
    "ppo_loss",
    "triton",
    PPOKernel(fwd, None, float32_only(runtime.wrong_device), missing=runtime.missing),
)

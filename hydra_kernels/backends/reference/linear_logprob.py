"""Log-probability, entropy and exact KL in plain PyTorch: the definition every kernel is tested
against."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logprob(
    hidden: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (M,) int64
    bias: Tensor | None,  # (V,)
    temperature: Tensor,  # ()
    softcap: float | None,
    ref_hidden: Tensor | None,  # (M, D)
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    keep = targets != ignore_index
    targets = torch.where(keep, targets, 0).unsqueeze(-1)

    def log_softmax(x: Tensor) -> tuple[Tensor, Tensor]:
        # Ignored rows may hold anything, inf included: zeroed first, they make no NaN.
        z = torch.nn.functional.linear(torch.where(keep.unsqueeze(-1), x, 0.0), weight, bias)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z / temperature.to(z.dtype)
        largest = z.detach().amax(-1, keepdim=True)
        # Less its maximum first: around 1e4 the gradient of torch's would have three digits.
        logsumexp = torch.logsumexp(z - largest, -1) + largest.squeeze(-1)
        return torch.log_softmax(z, -1), logsumexp

    def of_kept(row: Tensor) -> Tensor:
        return torch.where(keep, row, 0.0)

    logp, logsumexp = log_softmax(hidden)  # (M, V), (M,)
    p = logp.exp()
    logprobs = of_kept(logp.gather(-1, targets).squeeze(-1))
    entropy = of_kept(-(p * logp).sum(-1))
    logsumexp = of_kept(logsumexp)
    if ref_hidden is None:
        return logprobs, entropy, logsumexp, None, None

    logq, _ = log_softmax(ref_hidden.detach())
    logq = logq.detach()
    ref_logprobs = of_kept(logq.gather(-1, targets).squeeze(-1))
    # q - p sums to 0; with it the gradient is exactly 0 wherever logp equals logq.
    kl = of_kept((p * (logp - logq) + (logq.exp() - p)).sum(-1))
    return logprobs, entropy, logsumexp, ref_logprobs, kl

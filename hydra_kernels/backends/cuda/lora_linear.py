"""LoRA linear layers for few rows, in CUDA C++: csrc/cuda/lora_linear.cu. Decoding only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_kernels.backends import extension, launch, registry
from hydra_kernels.backends.cuda.device import architecture, wrong_device
from hydra_kernels.backends.lora_plan import Plan, columns, concatenated

_MAX_ROWS = 32
_MAX_RANKS = 64
_counters: dict[tuple[torch.device, int], Tensor] = {}


def unsupported(
    x: Tensor, ids: Tensor | None, seed: Tensor | None, *tensors: Tensor | None
) -> list[str]:
    """``tensors`` are the weights and biases, and the adapters."""
    given = [t for t in tensors if t is not None]
    reasons = wrong_device(x, ids, *tensors)
    if x.device.type == "cuda" and not reasons and architecture(x.device) < 80:
        reasons.append("needs code for compute capability 8.0 or newer, for its matrix products")
    if x.dtype not in (torch.float16, torch.bfloat16) or any(t.dtype != x.dtype for t in given):
        reasons.append("needs one of float16 and bfloat16, in all tensors")
    if x.numel() > _MAX_ROWS * x.shape[-1]:
        reasons.append(f"needs at most {_MAX_ROWS} rows")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *given)):
        reasons.append("has no backward")
    if seed is not None:
        reasons.append("has no dropout")
    matrices = [t for t in given if t.dim() == 2]
    inputs = x.shape[-1]
    # torch allocates at multiples of 512 bytes, and torch.compile knows offsets but no addresses
    if inputs == 0 or inputs % 8 != 0 or any(t.storage_offset() % 8 != 0 for t in (x, *matrices)):
        reasons.append("needs rows of whole 16 bytes")
    # Weights have all inputs as columns, and so have lora_a; the lora_b come last.
    weight = matrices[0]
    if not (weight.is_contiguous() and x.is_contiguous()):
        reasons.append("needs a contiguous x and weight")
    if sum(t.shape[1] for t in matrices[-(len(matrices) - 1) // 2 :]) > _MAX_RANKS:
        reasons.append(f"needs at most {_MAX_RANKS} ranks in all")
    return reasons


def unsupported_group(*tensors: Tensor | None) -> list[str]:
    return ["runs one projection at a time"]


def _counters_of(device: torch.device) -> Tensor:
    """(3,) int32 zeros, which every launch leaves at zero; one a stream, one a captured graph."""
    return launch.counters(_counters, 3, device)


def fwd(
    x: Tensor,  # (M, K)
    weights: Sequence[Tensor],  # one (N, K)
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],  # (R_j, K) for each adapter
    b: Sequence[Tensor],  # (N, R_j)
    plan: Plan,
    ids: Tensor | None,
    seed: Tensor | None,
) -> tuple[list[Tensor], None]:
    """Returns y (M, N), and nothing to save."""
    (weight,), (bias,) = weights, biases
    m, k = x.shape
    n = weight.shape[0]
    y = x.new_empty((m, n))
    lora_a, lora_b = concatenated(a, 0).contiguous(), concatenated(b, 1)
    ranks = lora_a.shape[0]
    owner, scale = columns(plan, tuple(t.shape[0] for t in a), torch.float32, x.device)
    s = x.new_empty((_MAX_ROWS, ranks), dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    counters = _counters_of(x.device)
    if ids is not None:
        ids = ids.to(torch.int64).contiguous()
    extension.module.lora_linear_decode_cuda(
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        lora_a.data_ptr(),
        lora_b.data_ptr(),
        lora_b.stride(0),
        lora_b.stride(1),
        0 if ids is None else ids.data_ptr(),
        owner.data_ptr(),
        scale.data_ptr(),
        s.data_ptr(),
        counters.data_ptr(),
        y.data_ptr(),
        m,
        n,
        k,
        ranks,
        1 if ids is None else max(m // max(ids.numel(), 1), 1),
        x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return [y], None


registry.register(
    "lora_linear", "cuda", registry.Kernel(fwd, None, unsupported, missing=extension.missing_cuda)
)
registry.register(
    "lora_linear_group",
    "cuda",
    registry.Kernel(fwd, None, unsupported_group, missing=extension.missing_cuda),
)

"""Which GPUs the extension's machine code runs on."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.recording import constant_to_compilers


def wrong_device(*tensors: Tensor | None) -> list[str]:
    """A reason where a tensor is on no GPU, or on one that the extension was not built for."""
    reasons = registry.wrong_device("cuda", *tensors)
    for t in () if reasons else tensors:
        # Asked of a GPU's tensors alone: to ask is to initialise CUDA, which forbids a fork.
        if t is not None and t.device.type == "cuda":
            reason = too_different(t.device)
            return [reason] if reason else []
    return reasons


@constant_to_compilers
def too_different(device: torch.device) -> str:
    """Why machine code for other GPUs does not run on this one; empty where it does."""
    return _too_different(device)


@functools.cache
def _too_different(device: torch.device) -> str:
    archs = str(extension.build_info.get("cuda_archs", ""))
    major, minor = torch.cuda.get_device_capability(device)
    if runs_as(archs, major, minor):
        return ""
    built = ", ".join(f"sm_{arch}" for arch in archs.split(","))
    return f"was built for {built}, got a GPU of sm_{major}{minor} (HYDRA_CUDA_ARCHS)"


def runs_as(archs: str, major: int, minor: int) -> int:
    """The architecture whose code of a build for ``archs`` runs there, 80 say; 0 for none."""
    plain = [int(arch) for arch in archs.split(",") if re.fullmatch(r"[0-9]+", arch)]
    capability = 10 * major + minor
    if f"{capability}a" in archs.split(","):
        return capability
    of_major = [arch for arch in plain if arch // 10 == major and arch <= capability]
    newest = max(plain, default=0)  # whose PTX the driver compiles
    return max(of_major, default=newest if newest <= capability else 0)


@constant_to_compilers
def architecture(device: torch.device) -> int:
    """As what the build's code runs on a GPU: what it may use is that architecture's."""
    return _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> int:
    archs = str(extension.build_info.get("cuda_archs", ""))
    return runs_as(archs, *torch.cuda.get_device_capability(device))

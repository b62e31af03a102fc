"""How close is close enough, and where a backend's tensors live."""

import torch
from torch import Tensor

from hydra_kernels.backends import registry


def device_of(backend: str) -> str:
    """The device on which ``backend`` is tested here."""
    return "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"


def fast_backends(op: str) -> list[str]:
    """The backends of ``op`` that can run on this machine, the reference left out."""
    return [name for name in registry.available_backends(op) if name != registry.REFERENCE]


def training_backends(op: str) -> list[str]:
    """Those that run every call of ``op``. That of lora_linear in CUDA C++ only decodes:
    tests/ops/test_lora_linear_decode.py has its tests."""
    return [n for n in fast_backends(op) if (op, n) != ("lora_linear", "cuda")]


def assert_no_worse_than_torch(
    actual: Tensor, same_dtype: Tensor, exact: Tensor, *, factor: float = 2.0, atol: float
) -> None:
    """The error is at most ``factor`` times that of plain PyTorch in the same dtype, plus ``atol``.

    ``exact`` is the float64 result. ``atol`` pays for a reference that happens to be exact; the
    test that passes it says where it comes from.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == same_dtype.dtype
    assert torch.isfinite(actual).all(), "not finite"
    if actual.numel() == 0:
        return
    allowed = factor * (same_dtype.double() - exact).abs().max() + atol
    error = (actual.double() - exact).abs()
    worst = error.argmax()
    assert error.max() <= allowed, (
        f"max error {error.max():.3e} > {allowed:.3e} at flat index {worst}: "
        f"got {actual.flatten()[worst]:.9g}, exact {exact.flatten()[worst]:.9g}"
    )

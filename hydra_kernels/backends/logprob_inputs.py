"""What the backends of ``linear_logprob`` are given: rows, a head, and how to read its logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogprobInputs(NamedTuple):
    """Checked: one device, one floating-point dtype of hidden, weight, bias and ref_hidden."""

    hidden: Tensor  # (M, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (M,) int64, contiguous
    bias: Tensor | None  # (V,)
    temperature: Tensor  # () float32
    softcap: float  # 0: none
    ref_hidden: Tensor | None  # (M, D); backward: None where kl has no upstream gradient
    ignore_index: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, D and V."""
        return *self.hidden.shape, self.weight.shape[0]  # type: ignore[return-value]


class LogprobKept(NamedTuple):
    """What backward has of the forward pass besides its inputs."""

    entropy: Tensor  # (M,)
    kl: Tensor  # (M,), 0 without a reference
    norms: Tensor  # (4, M): maximum and log of the sum, of the logits and of the reference's
    saved: Tensor | None  # (M, V) logits in hidden's dtype, where they were to be saved
    ref_saved: Tensor | None

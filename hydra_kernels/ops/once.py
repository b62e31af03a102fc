"""Gradients with no derivative of their own, refused where one is asked for.

A backward pass on kernels is invisible to autograd: under ``create_graph=True`` its results would
count as constants, and what a gradient penalty then adds would be left out without a word.
``torch.autograd.function.once_differentiable`` sees only the upstream gradients, which seldom ask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_kernels.backends import recording


def once(
    op: str, gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """``gradients``, which raise where they are differentiated with respect to ``inputs``, and at
    once where they stand for many (``is_grads_batched``).

    For the end of a ``backward``, and called there only under ``create_graph``: in grad mode.
    """
    if recording.any_batched(gradients):
        raise RuntimeError(_refusal(op))  # torch keeps no graph of a function of such tensors
    asking = [t for t in inputs if t is not None and t.requires_grad]
    return tuple(None if g is None else _Once.apply(op, g, *asking) for g in gradients)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, gradient, *_):
        ctx.op = op
        return gradient.clone()  # the backward may have handed out memory that it keeps

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_refusal(ctx.op))


def _refusal(op: str) -> str:
    return f"{op}: its gradient has no derivative of its own; that of backend='reference' has"

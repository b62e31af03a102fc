"""Whether somebody watches this thread's operations, so that ops are called as registered ones.

Kernels that are called with addresses are invisible to torch's dispatcher; a registered op is not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor


class _Recording(threading.local):
    on: bool = False


#: Whether ``hydra_kernels.replay`` records.
state = _Recording()


def watched() -> bool:
    """Whether a compiler traces, or a mode of torch's dispatcher is on.

    FakeTensorMode, make_fx, selective checkpointing, a recorder: under the first a tensor has no
    memory, and the others would take a result for what its empty tensor was.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def eager() -> bool:
    """Whether an op is no more than a call: no compiler, mode, transform or trace sees it."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


Function = TypeVar("Function", bound=Callable)


def constant_to_compilers(function: Function) -> Function:
    """As torch.compiler.assume_constant_result, which imports all of torch._dynamo to set this."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_fake(t: Tensor) -> bool:
    """Whether it is one of FakeTensorMode's, by what they alone have."""
    return hasattr(t, "fake_mode")


_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_grads_batched = torch._C._functorch.is_legacy_batchedtensor


def batched(t: Tensor) -> bool:
    """Whether it stands for many: under torch.vmap, or torch.autograd.grad's is_grads_batched."""
    return _wrapped(t) or _is_grads_batched(t)


def any_batched(tensors: Sequence[Tensor | None]) -> bool:
    for t in tensors:
        if t is not None and batched(t):
            return True
    return False


def readable(t: Tensor) -> bool:
    """Whether the values of a tensor on a CPU are there to be looked at."""
    if torch.compiler.is_compiling() or is_fake(t):
        return False
    if batched(t):
        return False
    return torch._C._get_dispatch_mode(_PROXY) is None


_PROXY = torch._C._TorchDispatchModeKey.PROXY  # make_fx's mode, to which a value is no constant

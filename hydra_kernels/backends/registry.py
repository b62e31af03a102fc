"""Which kernels exist for an op, and which one runs.

A backend adds a :class:`Kernel` per op. ``select`` returns the name of the backend to run. One
asked for by name, or by the environment variable ``HYDRA_BACKEND``, runs or raises; unasked, the
first in the op's order that can run the tensors does, and a log line says once why each one before
it was passed over.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from hydra_kernels.backends.recording import is_fake

REFERENCE = "reference"
# cpu before triton: they compete only where Triton's interpreter stands in for a GPU.
PRIORITY = ("cuda", "cpu", "triton", REFERENCE)

_log = logging.getLogger("hydra_kernels")


@dataclass(frozen=True)
class Kernel:
    """One backend's implementation of an op.

    Attributes:
        fwd: The forward pass, on checked arguments.
        bwd: The backward pass; None where the forward makes the gradients, or there are none.
        unsupported: Takes the op's tensors (None where an optional one is absent); returns the
            reasons it cannot run them, empty when it can.
        missing: The reasons this install can never run it, whatever the tensors.
    """

    fwd: Callable
    bwd: Callable | None
    unsupported: Callable[..., list[str]]
    missing: Callable[[], list[str]] = list


class Backends(tuple[str, ...]):
    """Names of the backends an install can run for an op; ``why_not`` has the reasons of the rest.

    A tuple in the order in which they are tried, so ``"cpu" in available_backends("gae")`` asks
    whether that backend can run.
    """

    why_not: dict[str, str]

    def __new__(cls, names: Sequence[str], why_not: dict[str, str]) -> Backends:
        self = super().__new__(cls, names)
        self.why_not = why_not
        return self

    def __repr__(self) -> str:
        rest = "".join(f"; not {name}: {why}" for name, why in self.why_not.items())
        return f"<{', '.join(self)}{rest}>"


class AllBackends(dict[str, Backends]):
    """The :class:`Backends` of every op, by name; shown as a table, with each reason once."""

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        lines = [f"{op:{width}}  {', '.join(found)}" for op, found in self.items()]
        ops: dict[tuple[str, str], list[str]] = {}
        for op, found in self.items():
            for item in found.why_not.items():
                ops.setdefault(item, []).append(op)
        for (backend, why), of in ops.items():
            only = "" if len(of) == len(self) else f" for {', '.join(of)}"
            lines.append(f"not {backend}{only}: {why}")
        return "\n".join(lines)


@dataclass
class _Installed:
    """Of one op: what each backend that this install can run refuses, in the order of trying; and
    which of them was chosen for float32 tensors on a device."""

    unsupported: dict[str, Callable[..., list[str]]]
    chosen: dict[tuple[str | None, torch.device], str] = field(default_factory=dict)


_KERNELS: dict[str, dict[str, Kernel]] = {}
_ORDER: dict[str, tuple[str, ...]] = {}
_UNAVAILABLE: dict[str, str] = {}
_INSTALLED: dict[str, _Installed] = {}  # by op; cleared by what changes it
_SAID: set[str] = set()  # the ops of which a log line says what this install cannot run


def _forget() -> None:
    """What was found out about the ops before a kernel, an order or a reason was new."""
    _INSTALLED.clear()
    _SAID.clear()


def register(op: str, backend: str, kernel: Kernel) -> None:
    """Adds ``kernel`` as the implementation of ``op`` by ``backend``; "reference" adds the op."""
    if backend not in PRIORITY:
        raise ValueError(f"{op}: no such backend {backend!r} (known: {', '.join(PRIORITY)})")
    table = _KERNELS.setdefault(op, {})
    if backend in table:
        raise ValueError(f"{op} already has a kernel for backend {backend!r}")
    table[backend] = kernel
    _forget()


def prefer(op: str, order: tuple[str, ...]) -> None:
    """Tries the backends of ``op`` in this order instead of that of ``PRIORITY``."""
    if sorted(order) != sorted(PRIORITY):
        raise ValueError(f"{op}: the order must name each of {', '.join(PRIORITY)} once")
    _ORDER[op] = order
    _forget()


def unavailable(backend: str, reason: str) -> None:
    """Says why no kernel of ``backend`` could be registered."""
    _UNAVAILABLE[backend] = reason
    _forget()


def kernel(op: str, backend: str) -> Kernel:
    return _KERNELS[op][backend]


def backends(op: str) -> tuple[str, ...]:
    """The backends written for ``op``, in the order they are tried, runnable here or not."""
    written = _KERNELS.get(op, {})
    return tuple(b for b in _ORDER.get(op, PRIORITY) if b == REFERENCE or b in written)


@overload
def available_backends(op: str) -> Backends: ...


@overload
def available_backends(op: None = None) -> AllBackends: ...


def available_backends(op: str | None = None) -> Backends | AllBackends:
    """The backends that this install can run for ``op``, and why not the rest.

    Args:
        op: An op's name, for instance "lora_linear"; None for all of them.

    Returns:
        A tuple of names, in the order in which they are tried, whose ``why_not`` maps each of the
        others to its reason; for ``op=None`` a dict of those by op, printed as a table. A backend
        listed may still refuse particular tensors (a dtype, another device), and then says why.

    Raises:
        ValueError: there is no such op.
    """
    if op is None:
        return AllBackends((name, _available(name)) for name in sorted(_KERNELS))
    if op not in _KERNELS:
        raise ValueError(f"no such op {op!r} (known: {', '.join(sorted(_KERNELS))})")
    return _available(op)


def _available(op: str) -> Backends:
    why_not: dict[str, str] = {}
    names = []
    for backend in _ORDER.get(op, PRIORITY):
        missing = _missing(op, backend)
        if missing:
            why_not[backend] = "; ".join(missing)
        else:
            names.append(backend)
    return Backends(names, why_not)


def runnable(op: str, *tensors: Tensor | None) -> tuple[str, ...]:
    """The backends that can run ``op`` on these very tensors."""
    return tuple(name for name in backends(op) if not _reasons(op, name, tensors))


def select(op: str, backend: str | None, *tensors: Tensor | None) -> str:
    """The backend that runs ``op`` on ``tensors``.

    Under a transform of torch.func (grad, vmap, jvp) or torch.jit.trace, and of tensors of a class
    that stands before torch's dispatcher (DTensor, quantised ones), it is the reference.

    Raises:
        NotImplementedError: ``backend``, or the one named by ``HYDRA_BACKEND``, cannot run the
            tensors; with every reason.
    """
    backend = asked_for(backend)
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return _only_reference(op, backend, "under a transform", _TRANSFORMS)
        if torch._C._get_tracing_state() is not None:
            return _only_reference(op, backend, "under torch.jit.trace", _TRACE)
        for t in tensors:
            if t is not None and type(t) not in PLAIN and not _has_an_address(t):
                reason = f"kernels take no {type(t).__qualname__}"
                return _only_reference(op, backend, "these tensors", reason)
    installed = _installed(op).unsupported
    if backend is None:
        if not torch.compiler.is_compiling() and op not in _SAID:
            _SAID.add(op)
            why_not = _available(op).why_not
            for name in backends(op):
                if name in why_not:
                    _say_once(op, name, why_not[name])
        for name, unsupported in installed.items():
            reasons = unsupported(*tensors)
            if not reasons:
                return name
            if not torch.compiler.is_compiling():
                _say_once(op, name, "; ".join(reasons))
        raise AssertionError("unreachable: the reference runs anything")
    refuses = installed.get(backend)
    reasons = _missing(op, backend) if refuses is None else refuses(*tensors)
    if reasons:
        given = ", ".join(
            f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in tensors if t is not None
        )
        why = "; ".join(reasons)
        raise NotImplementedError(f"{op}: backend {backend!r} cannot run {given}: {why}")
    return backend


def select_alike(op: str, backend: str | None, one: Tensor) -> str:
    """As :func:`select`, of tensors of which each has the device of ``one``, is float32 (or bool)
    and no more than memory, and outside of a compiler. For ops that refuse by device and dtype
    alone: what was chosen is not asked about again."""
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return select(op, backend, one)
    chosen = _installed(op).chosen
    key = (asked_for(backend), one.device)
    if key not in chosen:
        chosen[key] = select(op, backend, one)
    return chosen[key]


_TRANSFORMS = "torch.func's transforms (grad, vmap, jvp) need PyTorch's own operations"
_TRACE = "torch.jit.trace records PyTorch's own operations, and would take others for constants"
#: Classes of tensors that are no more than memory.
PLAIN = frozenset({Tensor, torch.nn.Parameter})


def _has_an_address(t: Tensor) -> bool:
    """Whether a kernel may be given it; a fake one, whose mode is on, never reaches a kernel."""
    if type(t).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return True
    return is_fake(t) and torch._C._len_torch_dispatch_stack() > 0


def _only_reference(op: str, backend: str | None, what: str, reason: str) -> str:
    """The reference, which is made of PyTorch's own operations."""
    if backend not in (None, REFERENCE):
        why = "; ".join([*_missing(op, backend), reason])
        raise NotImplementedError(f"{op}: backend {backend!r} cannot run {what}: {why}")
    for name in _available(op):
        if backend is None and name != REFERENCE:
            _say_once(op, name, reason)
    return REFERENCE


# What os.environ looks names up in: its own get() is four function calls, at every call of an op.
_environ: Mapping = getattr(os.environ, "_data", {})
_key = os.environ.encodekey("HYDRA_BACKEND") if _environ else "HYDRA_BACKEND"


def asked_for(backend: str | None) -> str | None:
    """``backend``, or where that is None what ``HYDRA_BACKEND`` names now."""
    if backend is not None:
        return backend
    if not _environ or torch.compiler.is_compiling():
        return os.environ.get("HYDRA_BACKEND") or None
    found = _environ.get(_key)
    return os.fsdecode(found) if found else None


def _installed(op: str) -> _Installed:
    """Found once: ops of some microseconds ask at every call."""
    compiling = torch.compiler.is_compiling()  # a graph would be guarded by what is kept
    found = None if compiling else _INSTALLED.get(op)
    if found is None:
        names = _available(op)
        found = _Installed(
            {n: _nothing if n == REFERENCE else _KERNELS[op][n].unsupported for n in names}
        )
        if not compiling:
            _INSTALLED[op] = found
    return found


def _nothing(*tensors: Tensor | None) -> list[str]:
    return []


@functools.cache
def _say_once(op: str, backend: str, reasons: str) -> None:
    _log.info("%s: passed over %s: %s", op, backend, reasons)


def _missing(op: str, backend: str) -> list[str]:
    if backend not in PRIORITY:
        return [f"no such backend (known: {', '.join(PRIORITY)})"]
    if backend == REFERENCE:
        return []
    if backend in _UNAVAILABLE:
        return [_UNAVAILABLE[backend]]
    if backend not in _KERNELS.get(op, {}):
        return [f"not written for this op (written: {', '.join(backends(op))})"]
    return _KERNELS[op][backend].missing()


def _reasons(op: str, backend: str, tensors: tuple[Tensor | None, ...]) -> list[str]:
    missing = _missing(op, backend)
    if missing or backend == REFERENCE:
        return missing
    return _KERNELS[op][backend].unsupported(*tensors)


def wrong_device(device: str, *tensors: Tensor | None) -> list[str]:
    """A reason when a tensor is not on a device of the type ``device``."""
    for t in tensors:
        if t is not None and t.device.type != device:
            break
    else:
        return []
    found = sorted({t.device.type for t in tensors if t is not None} - {device})
    return [f"needs tensors on {device}, got {', '.join(found)}"]


def wrong_dtype(allowed: Sequence[torch.dtype], *tensors: Tensor | None) -> list[str]:
    """A reason when a floating-point tensor has none of the dtypes ``allowed``."""
    for t in tensors:
        if t is not None and t.dtype not in allowed and t.is_floating_point():
            break
    else:
        return []
    found = sorted(
        {
            str(t.dtype)
            for t in tensors
            if t is not None and t.is_floating_point() and t.dtype not in allowed
        }
    )
    names = ", ".join(str(dtype) for dtype in allowed)
    return [f"needs {names}, got {', '.join(found)}"]

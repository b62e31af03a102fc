"""Backend "cuda" on tensors of the CPU: the product's Python, its kernels emulated.

What stands between the two is replaced while ``installed`` lasts: the extension's CUDA entries, the
check that tensors are on a GPU, streams, and the products that cuBLAS makes and a CPU has no form
of. Every tensor whose address is taken may be touched by the next launch, and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from hydra_kernels import backends  # noqa: F401  registers the kernels
from hydra_kernels.backends import extension, launch, registry
from hydra_kernels.backends.cuda import gae, lora_linear, masked_whiten, ppo_loss
from tests.cuda_on_cpu import build

MULTIPROCESSORS = 4  # few, so that blocks loop and rows are cut at sizes that run fast here


@functools.cache
def kernels() -> ModuleType:
    """CUDA_ON_CPU_MODULE names another than that of csrc: mutants.py does."""
    return build.load(Path(os.environ.get("CUDA_ON_CPU_MODULE") or build.build()))


class Emulated:
    """Stands in for ``hydra_kernels._C``: the CUDA entries emulated, the rest as they are."""

    def __init__(self, kernels: ModuleType, real: ModuleType | None):
        self._kernels, self._real = kernels, real
        self.buffers: dict[tuple[int, int], int] = {}  # address and bytes: bytes of an element
        self.tickets: list[Tensor] = []
        self.launches = 0

    def __getattr__(self, name: str):
        if not name.endswith("_cuda"):
            return getattr(self._real, name)
        entry = getattr(self._kernels, name)

        if name.endswith(_ASKING):
            return lambda *args: entry(*_with_device(args))

        def call(*args):
            self._kernels.set_buffers(
                [(start, size, element) for (start, size), element in self.buffers.items()]
            )
            self.buffers.clear()
            self.launches += 1
            try:
                entry(*_with_device(args))
            except RuntimeError as error:
                raise RuntimeError(with_lines(str(error), Path(self._kernels.__file__))) from None
            for counters in [*self.tickets, *lora_linear._counters.values()]:
                assert not counters.any(), f"{name} left its counters at {counters.tolist()}"

        return call

    def allow(self, t: Tensor) -> None:
        if t.numel():
            last = sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True))
            size = t.element_size()
            self.buffers[_data_ptr(t), (last + 1) * size] = size


_data_ptr = Tensor.data_ptr
_ASKING = ("_blocks_cuda", "_tiles_cuda", "_segments_cuda", "_name_cuda")  # launch nothing


def _with_device(args: tuple) -> list:
    """A tensor on the CPU has no device index."""
    return [0 if a is None else a for a in args]


class _Forgets(dict):
    """For tensors on a CPU the choice of a backend is remembered whatever their shape."""

    def __setitem__(self, key, value):
        pass


def with_lines(message: str, module: Path) -> str:
    """The message with lines of csrc in the place of addresses."""
    tool = shutil.which("addr2line")

    def line(match: re.Match) -> str:
        if tool is None:
            return match[0]
        before = hex(int(match[1], 16) - 1)  # a return address is that of the next instruction
        done = subprocess.run(
            [tool, "-i", "-e", str(module), before], capture_output=True, text=True
        )
        places = [p for p in done.stdout.split("\n") if "csrc/" in p]
        return "at " + ", in ".join(p[p.index("csrc/") :] for p in places[:3])

    return re.sub(r"\[code \+(0x[0-9a-f]+)\]", line, message)


def _with_out_dtype(product):
    """torch.mm and torch.addmm with the ``out_dtype`` that they take on a GPU alone."""

    @functools.wraps(product)
    def wide(*matrices: Tensor, out_dtype: torch.dtype | None = None, **kwargs) -> Tensor:
        if out_dtype is not None:
            matrices = tuple(t.to(out_dtype) for t in matrices)
        return product(*matrices, **kwargs)

    return wide


@contextlib.contextmanager
def installed(
    kernels: ModuleType | None, *, order="forward", seed=1, resident=4
) -> Iterator[Emulated]:
    """Within it backend "cuda" runs; without ``kernels`` it is only listed as available."""
    emulated = Emulated(kernels, extension.module)
    if kernels is not None:
        kernels.configure(
            order=order, seed=seed, resident=resident, multiprocessors=MULTIPROCESSORS
        )
    stack = contextlib.ExitStack()

    def put(owner, name, value):
        old = getattr(owner, name)
        setattr(owner, name, value)
        stack.callback(setattr, owner, name, old)

    wrong_device = registry.wrong_device

    def on_cpu(device: str, *tensors: Tensor | None) -> list[str]:
        return wrong_device("cpu" if device == "cuda" else device, *tensors)

    def data_ptr(t: Tensor) -> int:
        emulated.allow(t)
        return _data_ptr(t)

    def ticket(device: torch.device) -> Tensor:
        if not emulated.tickets:
            emulated.tickets.append(torch.zeros(1, dtype=torch.int32))
        return emulated.tickets[0]

    with stack:
        put(registry, "wrong_device", on_cpu)
        if kernels is not None:
            put(extension, "module", emulated)
            put(launch, "ticket", ticket)
            put(lora_linear, "_counters", {})
            for known in ("_CHOICES", "_PLANS"):
                put(importlib.import_module("hydra_kernels.ops.lora_linear"), known, _Forgets())
            put(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
            put(torch.cuda, "is_current_stream_capturing", lambda: False)
            put(Tensor, "data_ptr", data_ptr)
            put(torch, "mm", _with_out_dtype(torch.mm))
            put(torch, "addmm", _with_out_dtype(torch.addmm))
        for op, table in registry._KERNELS.items():
            if "cuda" in table:
                stack.callback(table.__setitem__, "cuda", table["cuda"])
                table["cuda"] = dataclasses.replace(table["cuda"], missing=list)
                stack.callback(registry._INSTALLED.pop, op, None)
        registry._INSTALLED.clear()
        caches = (gae.segments, masked_whiten._num_blocks, ppo_loss._num_blocks)
        for cache in caches:  # of another device's width
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        yield emulated

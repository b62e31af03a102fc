"""Recording a decoding step, for the CPU or a GPU, and whether what was recorded still holds."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hydra_kernels.replay import NotReplayable, Replay
from hydra_rlhf.model import HydraModel

# How far logits may be from PyTorch's when a replay is first tried, beside their largest: float32
# sums in another order, through every layer; or every layer rounded to 8 bits in PyTorch alone.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def recorded(
    model: HydraModel, step: Callable[[], tuple[Tensor, ...]], dtype: torch.dtype
) -> Replay:
    """A replay of ``step``, tried once: the first two tensors that it returns come out the same.

    Raises:
        NotReplayable: the step has no replay, or one that computes something else.
    """
    with casting_anew(), _experts_by_row(model):
        replay = Replay(step)
    first = [t.clone() for t in replay.outputs[:2]]
    replay()
    for was, now in zip(first, replay.outputs, strict=False):
        off, largest = float((was - now).abs().max()), float(was.abs().max())
        if not off <= _TOLERANCE.get(dtype, 0.0) * largest:
            raise NotReplayable(f"its replay is {off:.2g} off, of {largest:.2g}")
    return replay


def fingerprint(model: HydraModel) -> int:
    """Changes where a recorded step would no longer be what the model does."""

    def parts() -> Iterator[Any]:
        yield torch.is_autocast_enabled(model.device.type)
        for module in model.causal_lm.modules():
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    yield 0 if tensor is None else tensor.data_ptr()
            scaling = module.__dict__.get("scaling")
            if isinstance(scaling, dict):
                yield tuple((name, float(scale)) for name, scale in scaling.items())
                yield bool(getattr(module, "_disable_adapters", False))
                yield len(getattr(module, "merged_adapters", ()))
        yield model.config._attn_implementation

    return hash(tuple(parts()))


@contextlib.contextmanager
def _experts_by_row(model: HydraModel) -> Iterator[None]:
    """Each row's experts by their numbers, in transformers' own code: the other ways are lists
    of operations that depend on how many rows an expert has."""
    configs = {id(c): c for m in model.trunk.modules() if (c := getattr(m, "config", None))}
    chosen = [(c, c._experts_implementation) for c in configs.values() if _has_experts(c)]
    try:
        for config, _ in chosen:
            config._experts_implementation = "batched_mm"
        yield
    finally:
        for config, before in chosen:
            config._experts_implementation = before


def _has_experts(config: Any) -> bool:
    return getattr(config, "_experts_implementation", None) is not None


def captured(step: Callable[[], None], pool: Any, device: torch.device) -> torch.cuda.CUDAGraph:
    """``step`` as a CUDA graph in a pool of memory. It runs twice first, and not while captured."""
    with torch.cuda.device(device):
        side = _side_stream(device)
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with casting_anew():
            with torch.cuda.stream(side):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            # Of this thread alone: a data loader that pins memory meanwhile is nobody's error.
            with torch.cuda.graph(graph, pool, side, "thread_local"):
                step()
    return graph


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for every capture: cuBLAS keeps a workspace for each stream that it has run on, of 32 MiB
    on Hopper. torch's own is on the device of the process's first capture."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def casting_anew() -> Iterator[None]:
    """Autocast keeps no copy of a trained weight: a graph would read the copy of the day it was
    captured, where by then anything may lie, and not the weight."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)

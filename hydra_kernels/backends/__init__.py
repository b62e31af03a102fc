"""The implementations of every op. Importing this registers them all: one module an op."""

import importlib
import importlib.util
import pkgutil

import torch

from hydra_kernels.backends import cpu, cuda, reference, registry, triton
from hydra_kernels.backends.triton import runtime

_PACKAGES = [reference, cpu, cuda]
if importlib.util.find_spec("triton") is None:
    registry.unavailable("triton", "triton is not installed (it exists for Linux on x86-64)")
elif torch.version.cuda is None and torch.version.hip is None and not runtime.INTERPRETED:
    # A torch for CPUs will see no GPU, and to import Triton takes half a second. Where there may be
    # one it is not asked about here: that would keep the process from being forked.
    registry.unavailable("triton", runtime.missing()[0])
else:
    _PACKAGES.append(triton)

for _package in _PACKAGES:
    for _module in pkgutil.iter_modules(_package.__path__):
        importlib.import_module(f"{_package.__name__}.{_module.name}")

"""The implementations of every op. Importing this registers them all: one module an op."""

import importlib
import importlib.util
import pkgutil

from hydra_kernels.backends import cpu, cuda, reference, registry, triton

_PACKAGES = [reference, cpu, cuda]
if importlib.util.find_spec("triton") is not None:
    _PACKAGES.append(triton)
else:
    registry.unavailable("triton", "triton is not installed (it exists for Linux on x86-64)")

for _package in _PACKAGES:
    for _module in pkgutil.iter_modules(_package.__path__):
        importlib.import_module(f"{_package.__name__}.{_module.name}")

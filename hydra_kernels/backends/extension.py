"""The compiled extension ``hydra_kernels._C``, loaded once and sharing torch's OpenMP runtime.

The extension is linked without an OpenMP library of its own: two runtimes in one process hold two
pools of threads that spin against each other. Its undefined OpenMP symbols resolve to those of the
library that torch brought along, which is made global here first.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib
import importlib.util
import platform
import sys
from pathlib import Path
from types import ModuleType

import torch

_PATTERNS = ("libgomp*.so*", "libiomp5*", "libomp*")
# As CMakeLists.txt lists them: names, order and meaning of what is passed to the extension.
_INTERFACE = (
    "bindings.cpp",
    "cpu/entries.h",
    "cpu/lora_layout.h",
    "cpu/replay_words.h",
    "cuda/entries.h",
)


def _openmp_libraries() -> list[str]:
    """Paths of OpenMP runtimes, torch's own first."""
    package = Path(torch.__file__).parent
    folders = (package / "lib", package.parent / "torch.libs")
    found = [str(p) for f in folders for pattern in _PATTERNS for p in sorted(f.glob(pattern))]
    system = ctypes.util.find_library("gomp")
    return found + ([system] if system else [])


def share_openmp() -> None:
    """Make the symbols of torch's OpenMP runtime visible to libraries that are loaded later."""
    if sys.platform != "linux":
        return
    for path in _openmp_libraries():
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue  # the import that needs it fails, with its own reason, if none was loadable
        break


def _load() -> tuple[ModuleType | None, str]:
    if importlib.util.find_spec("hydra_kernels._C") is None:
        return None, (
            "the compiled extension is not part of this install (HYDRA_BUILD=none, or no C++ "
            "compiler when it was installed)"
        )
    share_openmp()
    try:
        found = importlib.import_module("hydra_kernels._C")
    except ImportError as error:
        return None, f"the compiled extension does not load: {error}"
    if is_stale(found.build_info(), Path(__file__).parents[2]):
        return None, (
            f"{found.__file__} was built before csrc was changed: build it again "
            "(pip install --no-build-isolation -e .)"
        )
    return found, ""


def is_stale(info: dict[str, object], root: Path) -> bool:
    """Whether the sources in ``root``, if there are any, expect to be called in another way."""
    files = [root / "csrc" / name for name in _INTERFACE]
    if not all(file.is_file() for file in files):
        return False  # installed: there is nothing beside the package
    digests = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return info.get("interface") != hashlib.sha256(digests.encode()).hexdigest()


#: The extension, or None; then ``why_not`` says why.
module, why_not = _load()


def _gemm_bf16() -> int:
    """The address of MKL's product of bfloat16 matrices within torch; 0 where there is none."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return 0
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.gemm_bf16bf16f32_, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


#: Whether it multiplies bfloat16 matrices to float32 results, and the processor has tiles for it.
has_bf16_blas = False
if module is not None and module.has_bf16_tiles():
    has_bf16_blas = (_address := _gemm_bf16()) != 0
    module.set_gemm_bf16(_address)
#: How it was built: whether with CUDA, the compiler, the vector level that runs.
build_info: dict[str, object] = module.build_info() if module is not None else {}
_WITH_CUDA = bool(build_info.get("cuda"))


def missing() -> list[str]:
    """Why the C++ kernels cannot run, whatever the tensors; empty when they can."""
    return [] if module is not None else [why_not]


def missing_cuda() -> list[str]:
    """Why the CUDA kernels cannot run, whatever the tensors; empty when they can."""
    if module is None:
        return [why_not]
    if not _WITH_CUDA:
        return ["the extension was built without CUDA (HYDRA_BUILD=cpu, or no CUDA compiler)"]
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    return []

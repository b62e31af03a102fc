"""Compiles csrc/cuda for the emulator into build/cuda_on_cpu, once for each state of it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from tests.cuda_on_cpu import translate

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda_on_cpu"
NAME = "cuda_on_cpu_kernels"

# Contraction as nvcc does it, where the machine has the instruction; -O1 compiles fast and keeps
# the accesses that the source has.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-w"]
WATCHED = [
    "-fsanitize=thread",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fsanitize=bool,enum,float-cast-overflow,null",
    "-D__CUDACC__",
    "-D__CUDA_ARCH__=900",
]


def compiler() -> str | None:
    return shutil.which("g++")


def missing() -> str:
    """Why it cannot be compiled here, or nothing."""
    if sys.platform != "linux":
        return "needs Linux"
    if compiler() is None:
        return "needs g++"
    if importlib.util.find_spec("pybind11") is None:
        return "needs pybind11"
    return ""


def _contraction() -> list[str]:
    with contextlib.suppress(OSError):
        if " fma " in Path("/proc/cpuinfo").read_text():
            return ["-mfma", "-ffp-contract=fast"]
    return ["-ffp-contract=off"]


def _tree(sources: dict[str, str]) -> str:
    return hashlib.sha256(
        "\0".join(f"{n}\0{t}" for n, t in sorted(sources.items())).encode()
    ).hexdigest()


def _included(name: str, sources: dict[str, str], seen: dict[str, str]) -> dict[str, str]:
    """``name`` and what it includes of ``sources``, directly or not."""
    if name in seen or name not in sources:
        return seen
    seen[name] = sources[name]
    for inner in re.findall(r'#include ["<]([\w/.]+)[">]', sources[name]):
        for found in (inner, f"include/{inner}", f"cuda/{inner}"):
            _included(found, sources, seen)
    return seen


def read_sources(changed: dict[str, str] | None = None) -> dict[str, str]:
    """Every translated file by its place below csrc; ``changed`` has other text for some."""
    changed = changed or {}
    sources = {}
    for path in [*(ROOT / "csrc" / "cuda").iterdir(), *(ROOT / "csrc" / "include").rglob("*.h")]:
        name = path.relative_to(ROOT / "csrc").as_posix()
        sources[name] = translate.kernels(changed.get(name) or path.read_text(), f"csrc/{name}")
    sources["bindings.cpp"] = translate.bindings((ROOT / "csrc" / "bindings.cpp").read_text())
    for path in [*(HERE / "include").iterdir(), HERE / "emulator.cpp"]:
        sources[f"emulator/{path.name}"] = path.read_text()
        sources[path.name] = path.read_text()
    return sources


def build(changed: dict[str, str] | None = None, extra: dict[str, str] | None = None) -> Path:
    """The compiled module. ``extra`` adds .cu files, already C++ and CUDA as in csrc."""
    CACHE.mkdir(parents=True, exist_ok=True)
    sources = read_sources(changed)
    for name, text in (extra or {}).items():
        sources[f"cuda/{name}"] = translate.kernels(text, name)
    out = CACHE / _tree(sources)[:16] / (NAME + sysconfig.get_config_var("EXT_SUFFIX"))
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker of pytest-xdist builds, the others wait
        if not out.exists():
            _compile(sources, out)
    return out


def _compile(sources: dict[str, str], out: Path) -> None:
    tree = out.parent / "csrc"
    shutil.rmtree(out.parent, ignore_errors=True)
    for name, text in sources.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    import pybind11

    common = [
        f"-I{tree / 'emulator'}",
        f"-I{tree}",
        f"-I{tree / 'include'}",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
    ]
    objects = CACHE / "objects"
    objects.mkdir(exist_ok=True)
    units = [name for name in sources if name.endswith(".cu")]

    def compile_one(name: str) -> Path:
        watched = name.endswith(".cu")
        flags = [*FLAGS, *_contraction(), *(WATCHED if watched else ["-DHYDRA_WITH_CUDA"])]
        used = _included(name, sources, {})
        key = hashlib.sha256((_tree(used) + " ".join([compiler(), sys.version, *flags])).encode())
        made = objects / f"{key.hexdigest()[:24]}.o"
        if not made.exists():
            partial = made.with_suffix(".tmp.o")
            _call([compiler(), *flags, *common, "-x", "c++", "-c", tree / name, "-o", partial])
            partial.rename(made)
        return made

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        made = list(pool.map(compile_one, ["bindings.cpp", "emulator/emulator.cpp", *units]))
    partial = out.with_suffix(".tmp")
    _call([compiler(), "-shared", "-o", partial, *made])
    partial.rename(out)


def _call(command: list) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-6000:]}")


def load(path: Path) -> ModuleType:
    # A name for each build: pybind11 3 gives out the first module of a name again.
    name = f"{path.parent.name}.{NAME}"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build())

"""Builds the extension hydra_kernels._C with CMake and ninja. Everything else is in pyproject.toml.

HYDRA_BUILD
    auto (default): CPU kernels, and CUDA kernels where a CUDA compiler is found. Without a C++
    compiler as none, and says so.
    cpu: CPU kernels only. cuda: both, and an error without a CUDA compiler.
    none: no extension; the reference and Triton backends remain.
HYDRA_CUDA_ARCHS
    Architectures such as "80;90a"; "release" for every one that is published. Default: that of the
    GPUs in this machine, else "80;90a".

The compiler is looked for in CUDACXX, CUDA_HOME, PATH and /usr/local/cuda; torch is not needed, and
nothing is downloaded.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODES = ("auto", "cpu", "cuda", "none")
DEVELOPMENT_ARCHS = ["80", "90a"]
RELEASE_ARCHS = ["80", "86", "89", "90a", "100", "120"]


def build_mode() -> str:
    mode = os.environ.get("HYDRA_BUILD") or "auto"
    if mode not in MODES:
        raise SystemExit(f"HYDRA_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    asked = [os.environ.get("CUDACXX"), *(str(Path(home, "bin/nvcc")) for home in homes if home)]
    for candidate in [path for path in asked if path]:
        found = shutil.which(candidate)
        if found is None:
            raise SystemExit(f"CUDACXX, CUDA_HOME or CUDA_PATH names {candidate}: no such compiler")
        return found
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def find_cxx() -> str | None:
    """The C++ compiler that CMake will take, or None."""
    asked = os.environ.get("CXX", "").split()
    if not asked:
        return next(filter(None, map(shutil.which, ("c++", "g++", "clang++", "icpx"))), None)
    found = shutil.which(asked[0])
    if found is None:
        raise SystemExit(f"CXX names {asked[0]}: no such compiler")
    return found


def cuda_archs(nvcc: str) -> list[str]:
    asked = os.environ.get("HYDRA_CUDA_ARCHS", "")
    known = run_text([nvcc, "--list-gpu-arch"]).split()
    if asked == "release":
        return [arch for arch in RELEASE_ARCHS if f"compute_{arch.rstrip('a')}" in known]
    archs = re.split(r"[;,\s]+", asked) if asked else nearest_archs(visible_archs(), known)
    for arch in archs:
        if f"compute_{re.sub('[a-z]$', '', arch)}" not in known:
            raise SystemExit(f"HYDRA_CUDA_ARCHS: {nvcc} does not know {arch!r} (it knows {known})")
    return archs


def visible_archs() -> list[str]:
    """The architectures of the GPUs in this machine, e.g. ["90a"]; empty without one."""
    try:
        answer = run_text(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    except (OSError, subprocess.CalledProcessError):
        return []
    archs = {line.strip().replace(".", "") for line in answer.splitlines() if line.strip()}
    # "a" unlocks Hopper's own instructions (wgmma, setmaxnreg).
    return [arch + "a" if arch == "90" else arch for arch in sorted(archs) if arch.isdigit()]


def nearest_archs(visible: list[str], known: list[str]) -> list[str]:
    """What nvcc knows for these GPUs: for one newer than itself the newest before it.

    That code, of the same generation, or else its PTX runs there. Of one older than all it knows
    nothing does, and a GPU that cannot be built for is no reason not to install.
    """
    plain = sorted(
        int(name) for name in (k.removeprefix("compute_") for k in known) if name.isdigit()
    )
    found: list[str] = []
    for arch in visible:
        number = int(arch.rstrip("a"))
        if number in plain:
            found.append(arch)
        elif before := [each for each in plain if each < number]:
            found.append(str(max(before)))
        if not found or found[-1] != arch:
            print(f"hydra_kernels: nvcc does not know sm_{arch}, a GPU of this machine", flush=True)
    return list(dict.fromkeys(found)) or DEVELOPMENT_ARCHS


def run_text(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def tool(name: str) -> str:
    """cmake or ninja: on PATH, or beside this interpreter (a virtual environment not activated)."""
    found = shutil.which(name) or shutil.which(Path(sys.executable).parent / name)
    if found is None:
        raise SystemExit(f"building hydra_kernels._C needs {name}: pip install {name}")
    return found


class CMakeBuild(build_ext):
    def run(self) -> None:
        mode = build_mode()
        nvcc = find_nvcc() if mode in ("auto", "cuda") else None
        if mode == "cuda" and nvcc is None:
            raise SystemExit(
                "HYDRA_BUILD=cuda: no CUDA compiler in CUDACXX, CUDA_HOME, PATH or /usr/local/cuda"
            )
        (extension,) = self.extensions
        output = ROOT / self.get_ext_fullpath(extension.name)
        self.cmake(output, nvcc)

    def cmake(self, output: Path, nvcc: str | None) -> None:
        import pybind11

        archs = cuda_archs(nvcc) if nvcc else []
        # Not self.build_temp: an editable install has a new one each time, and would start afresh.
        name = "-".join([sys.implementation.cache_tag, *(["cuda", *archs] if nvcc else ["cpu"])])
        build = ROOT / "build" / name
        build.mkdir(parents=True, exist_ok=True)
        command = [
            tool("cmake"),
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
        ]
        if nvcc:
            print(f"hydra_kernels: CUDA kernels for {', '.join(archs)} with {nvcc}", flush=True)
            command += [
                "-DHYDRA_WITH_CUDA=ON",
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                f"-DHYDRA_CUDA_ARCHS={';'.join(archs)}",
            ]
        else:
            print("hydra_kernels: CPU kernels only", flush=True)
        # pip's isolated environment has a new path each time; CMake's cache remembers the old one.
        key, stamp = json.dumps(command), build / "hydra_configured.json"
        if not stamp.exists() or stamp.read_text() != key:
            command.append("--fresh")
        subprocess.run(command, check=True)
        stamp.write_text(key)

        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([tool("cmake"), "--build", str(build), "--parallel", jobs], check=True)
        (built,) = build.glob("_C.*")
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, output)


def extensions() -> list[Extension]:
    mode = build_mode()
    if mode != "none" and find_cxx() is None:
        if mode != "auto":
            raise SystemExit(f"HYDRA_BUILD={mode}: no C++ compiler in CXX or PATH")
        print(
            "hydra_kernels: no C++ compiler in CXX or PATH, so the kernels in C++ are left out and "
            "PyTorch and Triton run in their place. With a compiler (g++ or clang), install again.",
            flush=True,
        )
        return []
    if mode != "none":
        return [Extension("hydra_kernels._C", sources=[])]
    if {"editable_wheel", "develop", "--inplace"} & set(sys.argv):
        # One left here by an earlier build would be imported all the same.
        for stale in ROOT.glob("hydra_kernels/_C.*"):
            print(f"HYDRA_BUILD=none: removing {stale.relative_to(ROOT)}", flush=True)
            stale.unlink()
    return []


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})

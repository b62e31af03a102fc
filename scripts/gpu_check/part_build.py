"""Builds the extension with CUDA in the copy of the tree, with the tools that are installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

TOOLS = ("cmake", "ninja", "c++")
SMALLEST = "csrc/cuda/device_name.cu"


def main(dry_run: bool) -> int:
    if missing := [name for name in ("pybind11", "setuptools", "torch") if not _module(name)]:
        print(f"missing Python packages: {', '.join(missing)}")
        return 1
    for name in TOOLS:
        beside = shutil.which(os.path.join(os.path.dirname(sys.executable), name))
        print(f"{name}: {shutil.which(name) or beside or 'not found'}")
    if dry_run:
        return compile_only()
    env = {**os.environ, "HYDRA_BUILD": "cuda"}
    built = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], env=env)
    if built.returncode:
        return built.returncode
    return subprocess.run([sys.executable, "-c", SHOW]).returncode


#: Fails where the extension does not load, or was built without CUDA.
SHOW = """
import hydra_kernels
from hydra_kernels.backends import extension
print(extension.module and extension.module.build_info() or extension.why_not)
for op, names in hydra_kernels.available_backends().items():
    print(op, names)
raise SystemExit("; ".join(extension.missing_cuda()))
"""


def compile_only() -> int:
    """One CUDA file and one op's Triton kernels for Hopper: no GPU is needed for either."""
    code = 0
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc:
        target = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17"]
        command = [nvcc, *target, "-Icsrc", "-Icsrc/include", "-cubin", "-o", os.devnull, SMALLEST]
        code = subprocess.run(command).returncode
        print(f"{SMALLEST}: {'compiled' if code == 0 else 'does not compile'} for sm_90a")
    else:
        print("nvcc: not found, no CUDA file was compiled")
    if _module("triton"):
        command = [sys.executable, "scripts/compile_check.py", "--only", "triton"]
        code |= subprocess.run([*command, "--match", "ppo_loss", "--arch", "90"]).returncode
    return code


def _module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


if __name__ == "__main__":
    sys.exit(main("--dry-run" in sys.argv))

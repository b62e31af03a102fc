"""What a figure was measured on: device, versions, commit and date."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
# Ours, what they run on, and the peers whose rows stand beside ours.
PACKAGES = (
    "hydra-rlhf",
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
)


@functools.cache
def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {os.cpu_count()} cores"


@functools.cache
def versions(device: str) -> dict[str, str]:
    """Installed packages of PACKAGES, Python, and on CUDA the toolkit and driver."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with its build, +cpu or +cu130
    if device == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return found


@functools.cache
def commit() -> str:
    """The short commit, with -dirty where tracked files differ from it.

    ``HYDRA_COMMIT`` overrides it, for a copy of the tree that carries no history.
    """
    if given := os.environ.get("HYDRA_COMMIT"):
        return given
    # Results are written while the benchmarks run, so they do not count as a change.
    changed = _output("git", "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    short = _output("git", "rev-parse", "--short", "HEAD")
    return short + ("-dirty" if changed and short != "unknown" else "")


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if done.returncode:
        return "unknown"
    return done.stdout.strip()

"""``pytest -m gpu``: every backend on the GPU, and what only a GPU can show."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path


def main(dry_run: bool) -> int:
    # A module that cannot be imported fails alone. The sanitizer is a part of its own.
    memcheck = "tests/gpu/test_sanitizer.py::test_memcheck_finds_nothing"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-ra", "-p", "no:cacheprovider",
               "--continue-on-collection-errors", "--deselect", memcheck]  # fmt: skip
    if dry_run:
        return subprocess.run([*command, "--collect-only"]).returncode
    results = Path("build/tests.xml").resolve()
    results.parent.mkdir(exist_ok=True)
    results.unlink(missing_ok=True)
    if importlib.util.find_spec("xdist"):
        # Kernels of eight processes share the GPU; most of a test is Python and Triton's compiler.
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    command += ["--tb=short", "--durations=15", f"--junitxml={results}"]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main("--dry-run" in sys.argv))

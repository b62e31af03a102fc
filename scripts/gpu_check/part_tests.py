"""``pytest -m gpu``: every backend on the GPU, and what only a GPU can show."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

RECORD = Path("build/tests.jsonl")  # below the copy of the tree; report.py reads it
HANGS = 60  # seconds after which a test hangs: the longest compile their kernels for about 20
#: Says which device it is, or torch's own reason for not taking it.
PROBE = """
import torch
torch.cuda.init()
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(i))
torch.ones(1, device="cuda").cpu()
"""


def main(dry_run: bool) -> int:
    # A module that cannot be imported fails alone. The sanitizer is a part of its own.
    memcheck = "tests/gpu/test_sanitizer.py::test_memcheck_finds_nothing"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider",
               "-p", "record_tests", "--continue-on-collection-errors", "--tb=short",
               "--deselect", memcheck]  # fmt: skip
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.unlink(missing_ok=True)
    env = {
        **os.environ,
        "GPU_CHECK_RECORD": str(RECORD.resolve()),
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    if dry_run:
        return subprocess.run([*command, "--collect-only"], env=env).returncode
    if subprocess.run([sys.executable, "-c", PROBE], env=env).returncode:
        print("torch does not take this machine's GPU: no test was run")
        return 1
    workers = importlib.util.find_spec("xdist") is not None
    if workers:
        # Kernels of twelve processes share the GPU; most of a test is Python and Triton's compiler.
        # One test at a time each, so that the order is kept.
        number = str(min(12, os.cpu_count() or 1))
        command += ["-n", number, "--dist", "load", "--maxschedchunk", "1"]
        env |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if importlib.util.find_spec("pytest_timeout"):
        # A signal would wait for the CUDA call that hangs. Without workers it has to do: the other
        # way ends the process.
        command += [f"--timeout={HANGS}", f"--timeout-method={'thread' if workers else 'signal'}"]
    return subprocess.run([*command, "--durations=15"], env=env).returncode


if __name__ == "__main__":
    sys.exit(main("--dry-run" in sys.argv))

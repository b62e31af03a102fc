"""compute-sanitizer's memcheck over every CUDA and Triton kernel at small sizes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PART = ROOT / "scripts" / "gpu_check" / "part_sanitizer.py"


def run(*args, **kwargs):
    return subprocess.run([sys.executable, PART, ROOT, "300", *args], cwd=ROOT,
                          capture_output=True, text=True, timeout=300, **kwargs)  # fmt: skip


@pytest.mark.gpu
def test_memcheck_finds_nothing():
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit, on the GPU's machine")
    done = run()
    if "not run:" in done.stdout:
        pytest.skip("compute-sanitizer does not take this machine's GPU")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def test_the_calls_under_it_reach_every_op():
    """The same calls on the CPU; a wrong answer fails, as it would on the GPU."""
    from benchmarks import harness

    done = run("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in harness.names():
        for bench in harness.load(name):
            if not hasattr(bench, "run") and harness.ours(bench.OP, "cpu"):
                assert f"\n{bench.OP} " in "\n" + done.stdout

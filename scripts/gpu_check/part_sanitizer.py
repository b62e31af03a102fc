"""compute-sanitizer's memcheck over the CUDA and Triton kernels at small sizes.

Where there is no compute-sanitizer, or it does not take the device (some virtual machines), the
part says so and passes: it has checked nothing, and its line in the summary is "not run".
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))  # the repository's root: benchmarks, tests

FOUND = 9  # memcheck's exit status when it has found something
REFUSALS = ("Device not supported", "error 999", "not supported on this")
#: Small, and each size once odd: masks and tails are where accesses go out of bounds.
SIZES = (16, 67)


def main(dry_run: bool) -> int:
    if dry_run:
        return calls("cpu")
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if tool is None:
        print("not run: no compute-sanitizer on this machine")
        return 0
    # torch's caching allocator hands out parts of larger blocks, within which nothing is "out of
    # bounds": each tensor gets its own block instead.
    env = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    # Libraries probe the driver with calls that are meant to fail: only accesses count here.
    memcheck = [tool, "--tool", "memcheck", "--report-api-errors", "no",
                f"--error-exitcode={FOUND}"]  # fmt: skip
    command = [*env, *memcheck, sys.executable, __file__, "--calls"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if any(words in done.stdout for words in REFUSALS):
        print("not run: compute-sanitizer does not take this device")
        return 0
    return done.returncode


def calls(device: str) -> int:
    """Forward and backward of every op by each of our backends; 1 where one of them is wrong."""
    import torch

    from benchmarks import harness
    from benchmarks.harness import Shape

    failed = 0
    for bench in (b for name in harness.names() for b in harness.load(name)):
        mine = ["cuda", "triton"] if device == "cuda" else harness.ours(bench.OP, device)
        for size in SIZES if not hasattr(bench, "run") else ():  # not the end-to-end ones
            sizes = bench.SHAPES[device][0].sizes
            shape = Shape({name: min(n, size) for name, n in sizes.items()}, "small")
            for dtype in bench.DTYPES[device]:
                for mode in bench.MODES:
                    torch.manual_seed(0)
                    inputs = bench.inputs(shape, dtype, device)
                    given = bench.calls(inputs, mode)
                    for row in (r for r in mine if callable(given.get(r))):
                        said = outcome(bench, inputs, mode, row, given[row])
                        failed += said.startswith("wrong")
                        print(f"{bench.OP} {mode} {shape} {dtype} {row}: {said}")
    return int(failed > 0)


def outcome(bench, inputs, mode: str, row: str, call) -> str:
    import torch

    try:
        output = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except NotImplementedError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}"
    problem = bench.check(inputs, mode, row, output)
    return f"wrong: {problem}" if problem else "ran"


if __name__ == "__main__":
    if "--calls" in sys.argv:
        sys.exit(calls("cuda"))
    sys.exit(main("--dry-run" in sys.argv))

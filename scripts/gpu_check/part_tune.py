"""Every candidate of lora_linear's Triton kernels at the sizes of a 7b model, timed and compared.

Run by --only tune, with seven minutes of its own: most of them are Triton's, compiling. The log has
the time of each candidate and what is wrong with those that were left out; tuning.json the rows of
what won, in the form of hydra_kernels/backends/tuning.json; tuned.jsonl the op with those choices,
beside the bare product.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))  # the repository's root: benchmarks

SPARE = 20  # seconds of the part's limit for the import, the last row and being stopped
COMPILED = "joint_kernel bf16 R=16 256x128"


def main(out: Path, limit: float, dry_run: bool) -> int:
    if dry_run:
        command = [sys.executable, "scripts/compile_check.py", "--only", "triton", "--arch", "90"]
        return subprocess.run([*command, "--match", COMPILED]).returncode
    os.environ.update(HYDRA_AUTOTUNE="1", HYDRA_TUNING_FILE=str(out / "tuning.json"))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("hydra_kernels").setLevel(logging.INFO)

    from benchmarks.__main__ import main as benchmarks_main

    return benchmarks_main(
        ["--device", "cuda", "--op", "lora_linear", "--op", "lora_linear_group",
         "--shape", "M=8192", "--row", "triton", "--row", "F.linear",
         "--mode", "fwd", "--mode", "fwd+bwd", "--json", str(out / "tuned.jsonl"),
         "--limit", str(max(10.0, limit - SPARE))]
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), "--dry-run" in sys.argv))

"""The op benchmarks, with the bare matrix product and the device copy as measured ceilings."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))  # the repository's root: benchmarks

SPARE = 20  # seconds of the part's limit for the import, the last row and being stopped


def main(out: Path, limit: float, dry_run: bool) -> int:
    from benchmarks import harness
    from benchmarks.__main__ import main as benchmarks_main

    if not dry_run:
        return benchmarks_main(
            ["--device", "cuda", "--quick", "--json", str(out / "ops.jsonl"),
             "--limit", str(max(10.0, limit - SPARE))]
        )  # fmt: skip
    effort = harness.Effort(rounds=3, seconds=0.1)
    bad = 0
    deadline = time.monotonic() + limit - SPARE
    for bench in (b for name in harness.names() for b in harness.load(name)):
        if hasattr(bench, "run"):
            continue
        # torch.compile takes seconds a row, and that it works is not in question here.
        rows = tuple(r for r in harness.rows_of(bench, "cpu") if "compile" not in r)
        options = harness.Options(device="cpu", rows=rows, effort=effort, deadline=deadline)
        for mode in bench.MODES:
            dtype = bench.DTYPES["cpu"][0]
            for record in harness.run_rows(bench, harness.tiny(bench, "cpu"), dtype, mode, options):
                harness.write(record, out / "ops.jsonl")
                print(record.op, record.mode, record.backend, record.status, record.why)
                bad += record.status in ("wrong", "failed")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), "--dry-run" in sys.argv))

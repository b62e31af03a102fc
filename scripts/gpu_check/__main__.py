"""Runs the parts of the GPU check one after another, each within its own time, and sums up.

Every part runs in build/gpu_check/tree, a copy of the working tree, so that building in place,
caches and whatever a test leaves behind stay below build/. The copy is brought up to date at each
call and what was built in it is kept, so a second call is incremental.

OUT gets gpu_check.json (all there is), gpu_check.csv (the tables, one row a line), the records of
the benchmarks (ops.jsonl, ppo.jsonl: the format of benchmarks/results) and a log a part.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import report
import tree

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "gpu_check"
#: 8 minutes 40 in all, stopping included; 20 seconds are left for the copy and the summary.
LIMITS = {"build": 100, "tests": 130, "sanitizer": 40, "ops": 150, "ppo": 100}
#: Eight files in all, so two parts share one.
LOGS = {"build": "build.log", "tests": "tests.log", "sanitizer": "sanitizer.log",
        "ops": "bench.log", "ppo": "bench.log"}  # fmt: skip
DRY_LIMIT = 240
GRACE = 8  # seconds between asking a part to stop, so that it writes what it has, and ending it
MAX_LOG = 4 * 2**20


@dataclass
class Part:
    name: str
    status: str  # "ok", "failed", "out of time", "interrupted"
    seconds: float
    limit: float
    code: int


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder for the results")
    says = f"one of {', '.join(LIMITS)}; may be given again"
    parser.add_argument("--only", action="append", choices=list(LIMITS), metavar="PART", help=says)
    says = "without a GPU: import, compile ahead of time, check the tables"
    parser.add_argument("--dry-run", action="store_true", help=says)
    args = parser.parse_args(argv)
    # A background job of a shell ignores SIGINT, and its children would: parts are stopped by it.
    # Either signal ends the run with the summary of what there is.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    out = Path(os.environ.get("GPU_CHECK_CALLED_FROM", "."), args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in report.FILES:
        (out / name).unlink(missing_ok=True)

    started = time.monotonic()
    copy = BUILD / "tree"
    tree.copy(ROOT, copy, skip=[out])
    env = environment(tree.commit(ROOT))
    parts = []
    saved = 0.0
    for name in args.only or LIMITS:
        limit = DRY_LIMIT if args.dry_run else LIMITS[name] + saved
        print(f"== {name}, at most {limit:.0f} s", flush=True)
        part = run(name, limit, out, copy, env, args.dry_run)
        saved = max(0.0, limit - part.seconds)  # what one part leaves, the next may use
        parts.append(part)
        print(f"== {name}: {part.status} after {part.seconds:.0f} s", flush=True)
        if part.status == "interrupted":
            break
    ran = [asdict(part) for part in parts]
    junit = copy / "build" / "tests.xml"
    summary = report.collect(out, ran, junit, env["HYDRA_COMMIT"], args.dry_run)
    summary["seconds"] = round(time.monotonic() - started, 1)
    report.write(summary, out)
    print(report.text(summary), flush=True)
    return int(any(part.status != "ok" for part in parts))


def environment(commit: str) -> dict[str, str]:
    """Every cache below build/, nothing from a network."""
    env = dict(os.environ)
    folders = {
        "TMPDIR": "tmp",
        "TRITON_CACHE_DIR": "triton",
        "TRITON_HOME": "triton_home",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "XDG_CACHE_HOME": "cache",
        "CUDA_CACHE_PATH": "cuda_cache",
        "HF_HOME": "huggingface",
        "MPLCONFIGDIR": "matplotlib",
        "HYPOTHESIS_STORAGE_DIRECTORY": "hypothesis",
        "PYTHONPYCACHEPREFIX": "pycache",
    }
    for name, folder in folders.items():
        path = BUILD / folder
        path.mkdir(parents=True, exist_ok=True)
        env[name] = str(path)
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env.pop("TRITON_INTERPRET", None)
    env.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", PYTHONUNBUFFERED="1")
    env["HYDRA_COMMIT"] = commit
    return env


def run(name: str, limit: float, out: Path, copy: Path, env: dict[str, str], dry_run: bool) -> Part:
    command = [sys.executable, f"scripts/gpu_check/part_{name}.py", str(out), f"{limit:.0f}"]
    if dry_run:
        command.append("--dry-run")
    started = time.monotonic()
    log = BUILD / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=copy, env=env, stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(max(1.0, limit - GRACE))
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, status = stop(process), "out of time"
        except KeyboardInterrupt:
            code, status = stop(process), "interrupted"
    text = log.read_bytes()
    if len(text) > MAX_LOG:
        text = text[: MAX_LOG // 2] + b"\n[...]\n" + text[-MAX_LOG // 2 :]
    with (out / LOGS[name]).open("ab") as file:
        file.write(text)
    if status != "ok":
        tail = text.decode(errors="replace").splitlines()[-15:]
        print("\n".join(f"   {line}" for line in tail), flush=True)
    return Part(name, status, round(time.monotonic() - started, 1), round(limit, 1), code)


def stop(process: subprocess.Popen) -> int:
    """Asks the part's own processes to end, then ends those that have not."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())

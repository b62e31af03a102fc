"""Runs the parts of the GPU check one after another, each within its own time, and sums up.

Every part runs in build/gpu_check/tree, a copy of the working tree, so that building in place,
caches and whatever a test leaves behind stay below build/. The copy is brought up to date at each
call and what was built in it is kept, so a second call is incremental.

OUT gets gpu_check.json (all there is), gpu_check.csv (the tables, one row a line), the records of
the benchmarks (ops.jsonl, ppo.jsonl: the format of benchmarks/results) and a log a part. Records
and logs are written as they come, the summary after every part: a run that is killed keeps them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import site
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import report
import tree

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "gpu_check"
TOTAL = 9 * 60 - 10  # seconds, of which no part may use more than is left; 10 are for the summary
#: 8 minutes 40 in all, stopping included.
LIMITS = {"build": 100, "tests": 130, "sanitizer": 40, "ops": 150, "ppo": 100}
#: Runs only where it is asked for.
ASKED = {"tune": 420}
DRY_LIMIT = 240
GRACE = 8  # seconds between asking a part to stop, so that it writes what it has, and ending it
ENDING = 2  # seconds for a killed process to be gone; one that hangs in the driver may stay
MAX_LOG = 4 * 2**20
MARK = "HYDRA_GPU_CHECK_PART"  # in the environment of every process that a part starts


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
    says = f"one of {', '.join(LIMITS)}, or {', '.join(ASKED)}; may be given again"
    names = [*LIMITS, *ASKED]
    parser.add_argument("--only", action="append", choices=names, metavar="PART", help=says)
    says = "without a GPU: import, compile ahead of time, check the tables"
    parser.add_argument("--dry-run", action="store_true", help=says)
    args = parser.parse_args(argv)
    # A background job of a shell ignores SIGINT, and its children would: parts are stopped by it.
    # Either signal ends the run with the summary of what there is.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    out = Path(os.environ.get("GPU_CHECK_CALLED_FROM", "."), args.out).resolve()
    started = time.monotonic()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in {*report.SUMMARY, *(f for p in args.only or LIMITS for f in report.OF_PART[p])}:
            (out / name).unlink(missing_ok=True)
        copy = BUILD / "tree"
        tree.copy(ROOT, copy, skip=[out])
        env = environment(tree.commit(ROOT), copy)
    except OSError as error:
        parser.error(f"cannot write to OUT and build/: {error}")
    parts: list[Part] = []
    saved = 0.0
    for name in args.only or LIMITS:
        limit = (LIMITS | ASKED)[name] + saved
        if args.dry_run:
            limit = DRY_LIMIT
        else:
            limit = min(limit, TOTAL - (time.monotonic() - started))
        print(f"== {name}, at most {limit:.0f} s", flush=True)
        part = run(name, limit, out, copy, env, args.dry_run)
        saved = max(0.0, limit - part.seconds)  # what one part leaves, the next may use
        parts.append(part)
        print(f"== {name}: {part.status} after {part.seconds:.0f} s", flush=True)
        tests = copy / "build" / "tests.jsonl"
        ran = [asdict(part) for part in parts]
        summary = report.collect(out, ran, tests, env["HYDRA_COMMIT"], args.dry_run)
        summary["seconds"] = round(time.monotonic() - started, 1)
        report.write(summary, out)
        if part.status == "interrupted":
            break
    print(report.text(summary), flush=True)
    return int(any(part.status != "ok" for part in parts))


def environment(commit: str, copy: Path) -> dict[str, str]:
    """Every cache below build/, nothing from a network."""
    env = dict(os.environ)
    folders = {
        "HOME": "home",
        "TMPDIR": "tmp",
        "TRITON_CACHE_DIR": "triton",
        "TRITON_HOME": "triton_home",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "XDG_CACHE_HOME": "cache",
        "CUDA_CACHE_PATH": "cuda_cache",
        "HF_HOME": "huggingface",
        "MPLCONFIGDIR": "matplotlib",
        "HYPOTHESIS_STORAGE_DIRECTORY": "hypothesis",
    }
    env["PYTHONUSERBASE"] = site.getuserbase()  # packages that are installed below the real HOME
    for name, folder in folders.items():
        path = BUILD / folder
        path.mkdir(parents=True, exist_ok=True)
        env[name] = str(path)
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.cached and Path(torch.cached).exists():
        # The bytecode of installed packages is read where it lies. What has none stays without.
        env["PYTHONDONTWRITEBYTECODE"] = "1"
        subprocess.run([sys.executable, "-m", "compileall", "-q", "-j", "0", str(copy)], env=env)
    else:
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        env["PYTHONPYCACHEPREFIX"] = str(BUILD / "pycache")
    env.pop("TRITON_INTERPRET", None)
    env.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", PYTHONUNBUFFERED="1")
    env["HYDRA_COMMIT"] = commit
    return env


def run(name: str, limit: float, out: Path, copy: Path, env: dict[str, str], dry_run: bool) -> Part:
    command = [sys.executable, f"scripts/gpu_check/part_{name}.py", str(out), f"{limit:.0f}"]
    if dry_run:
        command.append("--dry-run")
    started = time.monotonic()
    mark = f"{os.getpid()}-{name}"
    log = out / report.OF_PART[name][0]
    with log.open("ab") as file:
        before = file.tell()
        process = subprocess.Popen(
            command, cwd=copy, env={**env, MARK: mark}, stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(max(1.0, limit - GRACE - ENDING))
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        except KeyboardInterrupt:
            status = "interrupted"
        if status in ("out of time", "interrupted"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                process.wait(GRACE)
        # Also where the part is done: what it left would hold the device's memory.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid in (left := processes(mark)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING)
        if status in ("out of time", "interrupted"):
            code = -signal.SIGKILL if process.returncode is None else process.returncode
    text = log.read_bytes()
    if len(text) > MAX_LOG:
        text = text[: MAX_LOG // 2] + b"\n[...]\n" + text[-MAX_LOG // 2 :]
        log.write_bytes(text)
    if status != "ok":
        tail = text[min(before, len(text)) :].decode(errors="replace").splitlines()[-15:]
        print("\n".join(f"   {line}" for line in tail), flush=True)
    if left:
        print(f"   {len(left)} processes of it were still there and have been killed", flush=True)
    return Part(name, status, round(time.monotonic() - started, 1), round(limit, 1), code)


def processes(mark: str) -> list[int]:
    """Those that a part started, of whatever group or session they have made themselves since."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or gone by now
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main())

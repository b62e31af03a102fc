"""A copy of the working tree, brought up to date in place."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

#: Not source: what builds, virtual environments and runs leave behind. Dot files are left out too.
LEFT_OUT = {"build", "dist", "runs", "__pycache__", "node_modules"}


def source_files(root: Path, skip: Iterable[Path] = ()) -> list[Path]:
    """The files below ``root`` that are worth copying, relative to it."""
    skip = {path.resolve() for path in skip}
    found = []
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = [
            name
            for name in folders
            if name not in LEFT_OUT
            and not name.startswith(".")
            and not name.endswith(".egg-info")
            and (here / name).resolve() not in skip
        ]
        # An extension built for development may be for another Python or without CUDA.
        found += [
            (here / name).relative_to(root)
            for name in files
            if not name.startswith(".") and not name.endswith((".so", ".pyd", ".pyc"))
        ]
    return sorted(found)


def copy(root: Path, to: Path, skip: Iterable[Path] = ()) -> None:
    """Files that have not changed keep their time, so that a build in the copy is incremental.

    One that has changed gets the present time, not its own, which may be older than the build.
    """
    wanted = source_files(root, skip)
    for stale in set(source_files(to)) - set(wanted) if to.exists() else ():
        (to / stale).unlink()
    for path in wanted:
        target = to / path
        if target.exists() and filecmp.cmp(root / path, target, shallow=False):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # which may be read-only, as its source was
        shutil.copy(root / path, target)


def commit(root: Path) -> str:
    """The copy has no history, so the benchmarks in it are told."""
    if given := os.environ.get("HYDRA_COMMIT"):
        return given
    try:
        git = ["git", "--no-optional-locks", "-C", str(root)]  # status would write to the index
        short = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], check=True, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return short + ("-dirty" if changed.strip() else "")

"""Runs PEFT's own LoRA tests stock and with our layers put in, and compares what passes.

    python -m tests.peft_compat.run [--ways fuse register context] [--files test_mixed.py ...]
                                    [-k EXPRESSION] [--workers 2]

The sdist of the installed PEFT is downloaded into build/peft-compat (it carries tests/, the wheel
does not) and nothing of it enters this repository. Tests that need the hub fail in both runs: the
network is off. The exit status is 1 when a test that passes stock does not pass with our layers.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "peft-compat"
# What has LoRA layers and needs no hub; the rest of PEFT's files are for other methods or GPUs.
FILES = (
    "test_arrow.py",
    "test_bdlora.py",
    "test_custom_models.py",
    "test_helpers.py",
    "test_initialization.py",
    "test_integrations.py",
    "test_lora_conversion.py",
    "test_lora_ga.py",
    "test_lora_intruders.py",
    "test_lora_variants.py",
    "test_lorafa.py",
    "test_loraplus.py",
    "test_low_level_api.py",
    "test_mapping.py",
    "test_mixed.py",
    "test_other.py",
    "test_target_parameters.py",
    "test_tuners_utils.py",
    "test_velora.py",
)
# What PEFT's tests import beside what ours do.
NEEDED = {"attr": "attrs", "PIL": "pillow"} | {
    name: name
    for name in (
        "certifi",
        "charset_normalizer",
        "diffusers",
        "idna",
        "importlib_metadata",
        "parameterized",
        "requests",
        "scipy",
        "urllib3",
        "zipp",
    )
}


def sources() -> Path:
    """The unpacked sdist of the installed PEFT."""
    name = f"peft-{version('peft')}"
    if not (WORK / name / "tests").is_dir():
        WORK.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "peft"]
        command += ["--no-build-isolation", "-q", "-d", str(WORK), f"peft=={version('peft')}"]
        subprocess.run(command, check=True)
        with tarfile.open(WORK / f"{name}.tar.gz") as archive:
            archive.extractall(WORK, filter="data")
        # A package of their own beside ours, which the path below does not reach.
        (WORK / name / "tests" / "__init__.py").touch()
    path = WORK / "path"
    path.mkdir(exist_ok=True)
    if not (path / "hydra_kernels").exists():
        (path / "hydra_kernels").symlink_to(ROOT / "hydra_kernels")
    missing = [
        package
        for name, package in NEEDED.items()
        if importlib.util.find_spec(name) is None and not (path / name).exists()
    ]
    if missing:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(path)]
        subprocess.run([*command, *missing], check=True)
    return WORK / name


def run(tests: Path, way: str, options: argparse.Namespace) -> dict[str, str]:
    """What became of each test: passed, failed, error or skipped."""
    report, counts = WORK / f"{way}.xml", WORK / f"{way}-counts"
    shutil.rmtree(counts, ignore_errors=True)
    counts.mkdir(parents=True)
    env = {
        **os.environ,
        "HYDRA_PEFT_WAY": way,
        "HYDRA_PEFT_COUNTS": str(counts),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(WORK / "path"), str(Path(__file__).parent), str(tests)]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "hydra_layers"]
    command += [
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "--timeout=300",
        f"--junitxml={report}",
    ]
    command += ["-n", str(options.workers)] if options.workers > 1 else []
    command += ["-k", options.k] if options.k else []
    command += ["--rootdir", str(tests), "-c", os.devnull]
    command += [str(tests / "tests" / name) for name in options.files]
    start = time.monotonic()
    with open(WORK / f"{way}.log", "w") as log:
        subprocess.run(command, env=env, cwd=tests, stdout=log, stderr=subprocess.STDOUT)
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = "failed" if found & {"failure", "error"} else "skipped" if found else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    forwards: Counter = Counter()
    for path in counts.iterdir():
        forwards.update(json.loads(path.read_text()))
    share = forwards["_fast_forward"] / max(forwards["forward"], 1)
    print(
        f"{way:9} {dict(sorted(Counter(outcomes.values()).items()))}, "
        f"{forwards['forward']} forwards of our layers, {share:.0%} on the fast path, "
        f"{time.monotonic() - start:.0f} s",
        flush=True,
    )
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="+", default=["fuse", "register", "context"])
    parser.add_argument("--files", nargs="+", default=list(FILES))
    parser.add_argument("-k", default="")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    tests = sources()
    options.files = [name for name in options.files if (tests / "tests" / name).exists()]
    stock = run(tests, "stock", options)
    if not stock:
        print(f"no test ran: see {WORK / 'stock.log'}")
        return 1
    worse = 0
    for way in options.ways:
        ours = run(tests, way, options)
        for name, outcome in stock.items():
            if outcome == "passed" and ours.get(name) != "passed":
                print(f"  {ours.get(name, 'missing')}: {name}")
                worse += 1
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs PEFT's own LoRA tests stock and with our layers put in, and compares what passes.

    python -m tests.peft_compat.run [--ways fuse register context] [--files test_mixed.py ...]
                                    [--every N] [--keep]

The sdist of the installed PEFT is downloaded into build/peft-compat (it carries tests/, the wheel
does not) and nothing of it enters this repository. Tests that need the hub fail in all runs: the
network is off. Tests of other methods than LoRA are left out. Each file and way is a process of its
own, whose outcomes are recorded there, so that ``--keep`` goes on where a run was ended. The exit
status is 1 when a test that passes stock does not pass with our layers.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from dataclasses import dataclass
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


@dataclass
class Record:
    """What became of one file's tests, one way in."""

    outcomes: dict[str, str]  # passed, failed or skipped, by the test's name
    forwards: dict[str, int]  # "fast", and the others by what they asked for
    seconds: float


def run(tests: Path, way: str, file: str, options: argparse.Namespace) -> Record:
    folder = WORK / version("peft") / (f"every-{options.every}" if options.every > 1 else "whole")
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{Path(file).stem}-{way}"
    record, report, counts = (stem.with_suffix(end) for end in (".json", ".xml", ".counts"))
    if options.keep and record.exists():
        return Record(**json.loads(record.read_text()))
    report.unlink(missing_ok=True)
    counts.unlink(missing_ok=True)
    env = {
        **os.environ,
        "HYDRA_PEFT_WAY": way,
        "HYDRA_PEFT_EVERY": str(options.every),
        "HYDRA_PEFT_COUNTS": str(counts),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(WORK / "path"), str(Path(__file__).parent), str(tests)]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "hydra_layers", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "--timeout=600", f"--junitxml={report}"]
    command += ["--tb=short", "--rootdir", str(tests), "-c", os.devnull]
    command += [str(tests / "tests" / file)]
    start = time.monotonic()
    with open(stem.with_suffix(".log"), "w") as log:
        subprocess.run(command, env=env, cwd=tests, stdout=log, stderr=subprocess.STDOUT)
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = "failed" if found & {"failure", "error"} else "skipped" if found else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    forwards = json.loads(counts.read_text()) if counts.exists() else {}
    done = Record(outcomes, forwards, time.monotonic() - start)
    record.write_text(json.dumps(dataclasses.asdict(done)))
    return done


def line(name: str, outcomes: Counter, forwards: Counter, seconds: float) -> str:
    counted = ", ".join(f"{outcomes[each]} {each}" for each in ("passed", "failed", "skipped"))
    text = f"{name:9} {counted}, {seconds:.0f} s"
    total = sum(forwards.values())
    if total:
        rest = [f"{n} {why}" for why, n in forwards.most_common() if why != "fast"]
        text += f"; {total} forwards of our layers, {forwards['fast'] / total:.0%} on the fast path"
        text += f" ({', '.join(rest)})" if rest else ""
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="+", default=["fuse", "register", "context"])
    parser.add_argument("--files", nargs="+", default=list(FILES))
    parser.add_argument("--every", type=int, default=1, help="run each EVERY-th test only")
    parser.add_argument("--keep", action="store_true", help="count what an earlier run recorded")
    options = parser.parse_args()
    tests = sources()
    outcomes: defaultdict[str, Counter] = defaultdict(Counter)
    forwards: defaultdict[str, Counter] = defaultdict(Counter)
    seconds: Counter = Counter()
    worse = 0
    for file in options.files:
        if not (tests / "tests" / file).exists():  # of another version of PEFT
            continue
        print(file)
        stock: Record | None = None
        for way in ["stock", *options.ways]:
            got = run(tests, way, file, options)
            stock = stock or got
            found, ran = Counter(got.outcomes.values()), Counter(got.forwards)
            print("  " + line(way, found, ran, got.seconds), flush=True)
            for name, outcome in stock.outcomes.items():
                if got.outcomes.get(name, "missing") != outcome:
                    print(f"    {outcome} stock, {got.outcomes.get(name, 'missing')}: {name}")
                    worse += outcome == "passed"
            outcomes[way].update(found)
            forwards[way].update(ran)
            seconds[way] += got.seconds
    print(f"peft {version('peft')}, transformers {version('transformers')}, all files")
    for way, found in outcomes.items():
        print("  " + line(way, found, forwards[way], seconds[way]))
    return 1 if worse or not outcomes["stock"]["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""scripts/gpu_check.sh on a machine without a GPU: its dry run, its limits and its tables."""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "gpu_check"


@pytest.fixture(scope="module")
def check():
    """The script's own modules, as it imports them."""
    sys.path.insert(0, str(FOLDER))
    try:
        names = ("report", "tree")
        modules = {name: importlib.import_module(name) for name in names}
        spec = importlib.util.spec_from_file_location("gpu_check_main", FOLDER / "__main__.py")
        main = importlib.util.module_from_spec(spec)
        sys.modules["gpu_check_main"] = main  # dataclasses look their module up
        spec.loader.exec_module(main)
        yield type("check", (), {"main": main, **modules})
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("report", "tree", "gpu_check_main"):
            sys.modules.pop(name, None)


def files_below(folder):
    return {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}


def test_dry_run_of_every_part(tmp_path, check):
    """In a copy of the repository, to see that nothing but OUT and build/ is written."""
    repo, out = tmp_path / "repo", tmp_path / "out"
    check.tree.copy(ROOT, repo)
    before = {p: (repo / p).stat().st_mtime_ns for p in files_below(repo)}
    done = subprocess.run(
        [repo / "scripts" / "gpu_check.sh", "../out", "--dry-run"],
        cwd=repo, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    logs = "".join(p.read_text() for p in out.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs

    after = {p: (repo / p).stat().st_mtime_ns for p in files_below(repo) if p.parts[0] != "build"}
    assert after == before
    files = files_below(out)
    assert {str(p) for p in files} == set(check.report.FILES) and len(files) <= 8
    assert max((out / p).stat().st_size for p in files) < 16 * 2**20

    summary = json.loads((out / "gpu_check.json").read_text())
    assert [p["name"] for p in summary["parts"]] == ["build", "tests", "sanitizer", "ops", "ppo"]
    assert {p["status"] for p in summary["parts"]} == {"ok"}
    assert {row["op"] for row in summary["ops"]} >= {"ppo_loss"}
    assert all(row["ours ms"] > 0 for row in summary["ops"])
    assert {row["method"] for row in summary["ppo"]} == {
        "lora-ppo", "d-lora-ppo", "j-hydra-ppo", "hydra-ppo"
    }  # fmt: skip
    assert all(row["s/sample"] > 0 and row["planned GiB"] > 0 for row in summary["ppo"])
    assert "ppo_loss_fwd_kernel" in (out / "build.log").read_text()
    assert "tests collected" in (out / "tests.log").read_text()
    assert done.stdout.rstrip().splitlines()[-1].startswith("hydra-ppo")
    with (out / "gpu_check.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(summary["ops"]) + len(summary["ppo"])


@pytest.fixture
def driver(check, tmp_path, monkeypatch):
    """The driver over a repository whose parts are what a test says."""
    repo = tmp_path / "repo"
    (repo / "scripts" / "gpu_check").mkdir(parents=True)
    monkeypatch.setattr(check.main, "ROOT", repo)
    monkeypatch.setattr(check.main, "BUILD", repo / "build" / "gpu_check")
    monkeypatch.setattr(check.main, "GRACE", 1.0)
    monkeypatch.setenv("HYDRA_COMMIT", "abc1234")
    out = tmp_path / "out"

    def run(parts, *args, limits=None):
        for name, source in parts.items():
            (repo / "scripts" / "gpu_check" / f"part_{name}.py").write_text(source)
        monkeypatch.setattr(check.main, "LIMITS", limits or dict.fromkeys(parts, 20))
        code = check.main.main([str(out), *args])
        return code, json.loads((out / "gpu_check.json").read_text()), out

    return run


def test_a_failing_part_does_not_stop_the_next(driver, capsys):
    parts = {
        "build": "import sys\nprint('no compiler here')\nsys.exit(3)\n",
        "tests": "print('ran')\n",
    }
    code, summary, out = driver(parts)
    assert code == 1
    assert [(p["name"], p["status"], p["code"]) for p in summary["parts"]] == [
        ("build", "failed", 3), ("tests", "ok", 0)
    ]  # fmt: skip
    assert (out / "tests.log").read_text() == "ran\n"
    assert "no compiler here" in capsys.readouterr().out  # a failure is seen without its log


SLEEPS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal, time; "
                          "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"])
pathlib.Path(sys.argv[1], "child").write_text(str(child.pid))
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("kept what there was", flush=True)
    time.sleep(60)
"""


def test_a_part_is_stopped_at_its_limit_and_the_next_one_runs(driver, tmp_path):
    started = time.monotonic()
    limits = {"tests": 2, "ops": 20}
    code, summary, out = driver({"tests": SLEEPS, "ops": "print('ran')\n"}, limits=limits)
    assert time.monotonic() - started < 20
    assert code == 1
    assert [p["status"] for p in summary["parts"]] == ["out of time", "ok"]
    assert (out / "tests.log").read_text() == "kept what there was\n"
    pid = int((out / "child").read_text())
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "zombie" in status.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_sums_up_what_there_is(driver, capsys, number):
    """By the keyboard, or by whoever lent the machine."""
    stops = f"import os, time\nos.kill(os.getppid(), {int(number)})\ntime.sleep(60)\n"
    before = signal.getsignal(signal.SIGTERM)
    try:
        code, summary, out = driver({"build": "print('built')\n", "tests": stops, "ops": "1\n"})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 1
    assert [p["status"] for p in summary["parts"]] == ["ok", "interrupted"]
    assert "tests      interrupted" in capsys.readouterr().out
    assert (out / "gpu_check.csv").exists()


def test_being_stopped_is_within_the_limit(driver, check, monkeypatch):
    """Five parts that all hang still end within the nine minutes."""
    monkeypatch.setattr(check.main, "GRACE", 3.0)
    stubborn = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)\n"
    _, summary, _ = driver({"tests": stubborn}, limits={"tests": 6})
    (part,) = summary["parts"]
    assert part["status"] == "out of time" and part["seconds"] < 6.9


def test_a_part_that_crashes_is_a_failed_one(driver):
    crash = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    code, summary, _ = driver({"build": crash, "tests": "print('ran')\n"})
    assert code == 1
    assert [(p["status"], p["code"]) for p in summary["parts"]] == [("failed", -11), ("ok", 0)]


def test_time_that_is_left_goes_to_the_next_part(driver):
    say = "import sys\nprint(sys.argv[2])\n"
    _, summary, out = driver({"build": say, "tests": say}, limits={"build": 30, "tests": 10})
    assert (out / "build.log").read_text() == "30\n"
    first, second = summary["parts"]
    assert second["limit"] == pytest.approx(10 + 30 - first["seconds"], abs=0.2)


def test_only_one_part_and_what_an_earlier_run_left_is_not_taken_for_its_own(driver):
    driver({"ops": "print('first')\n", "ppo": "print('first')\n"})
    code, summary, out = driver({"ops": "print('second')\n", "ppo": ""}, "--only", "ops")
    assert code == 0
    assert [p["name"] for p in summary["parts"]] == ["ops"]
    assert (out / "bench.log").read_text() == "second\n"


def test_the_limits_add_up_to_less_than_nine_minutes(check):
    assert list(check.main.LIMITS) == ["build", "tests", "sanitizer", "ops", "ppo"]
    assert sum(check.main.LIMITS.values()) <= 9 * 60 - 20  # the copy and the summary


def record(op, backend, ms, mode="fwd", gb=None, tflop=None, status="ok", **rest):
    return {"op": op, "mode": mode, "backend": backend, "shape": {"M": 8}, "dtype": "bfloat16",
            "status": status, "why": "", "ms": ms, "gb_per_s": gb, "tflop_per_s": tflop,
            "figures": {}, **rest}  # fmt: skip


CEILINGS = [
    record("ceilings", "torch", 1.0, "copy", gb=4000.0),
    record("ceilings", "torch", 1.0, "copy", gb=3000.0),
    record("ceilings", "torch", 1.0, "product", tflop=800.0),
]


def test_the_share_is_of_what_the_machine_was_measured_to_reach(check):
    """2 ms at 400 TFLOP/s is 1 ms at the 800 that a bare product reaches: half of it."""
    records = [
        *CEILINGS,
        record("lora_linear", "triton", 3.0, tflop=266.7),
        record("lora_linear", "cuda", 2.0, gb=1000.0, tflop=400.0),
        record("lora_linear", "peft", 5.0),
        record("lora_linear", "unsloth-style", 4.0),
        record("lora_linear", "F.linear", 1.9),
    ]
    (row,) = check.report.op_rows(records)
    assert (row["ours"], row["ours ms"]) == ("cuda", 2.0)
    assert (row["best peer"], row["peer ms"]) == ("unsloth-style", 4.0)
    assert row["ceiling ms"] == pytest.approx(1.0)
    assert row["share"] == pytest.approx(0.5)


def test_bytes_decide_where_they_take_longer(check):
    records = [*CEILINGS, record("gae", "cuda", 2.0, gb=3000.0, tflop=1.0)]
    (row,) = check.report.op_rows(records)
    assert row["ceiling ms"] == pytest.approx(1.5) and row["share"] == pytest.approx(0.75)


def test_an_op_without_a_time_is_in_the_table(check):
    records = [record("gae", "cuda", None, status="wrong"), record("gae", "eager", 1.0)]
    (row,) = check.report.op_rows(records)
    assert row["ours"] == "wrong" and row["ours ms"] is None and row["best peer"] == "eager"
    text = check.report.table(check.report.OP_COLUMNS, [row]).splitlines()[-1].split()
    assert text[-2:] == ["-", "-"]


def test_a_line_that_was_cut_short_is_left_out(check, tmp_path):
    path = tmp_path / "ops.jsonl"
    path.write_text(json.dumps(CEILINGS[0]) + "\n" + json.dumps(CEILINGS[1])[:40])
    assert check.report.read_records(path) == CEILINGS[:1]


def test_counts_of_the_tests(check, tmp_path):
    junit = tmp_path / "tests.xml"
    junit.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.a" name="one"/>'
        '<testcase classname="tests.a" name="two"><failure message="x != y&#10;more"/></testcase>'
        '<testcase classname="tests.a" name="three"><skipped message="why"/></testcase>'
        "</testsuite></testsuites>"
    )
    counts = check.report.test_counts(junit)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 1, 1)
    assert counts["failures"] == [{"test": "tests.a::two", "said": "x != y"}]
    assert check.report.test_counts(tmp_path / "missing.xml") == {}


def test_the_copy_follows_the_tree(check, tmp_path):
    root, to = tmp_path / "root", tmp_path / "to"
    for name in ("a.py", "b/c.py", "b/_C.so", ".git/x", "build/y", "out/z", "gone.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    check.tree.copy(root, to, skip=[root / "out"])
    assert {str(p) for p in files_below(to)} == {"a.py", "b/c.py", "gone.py"}
    (to / "b" / "_C.so").write_text("built in the copy")
    (root / "gone.py").unlink()
    (root / "a.py").write_text("new")
    os.utime(root / "a.py", (0, 0))  # as a checkout of an older commit may leave it
    kept = (to / "b" / "c.py").stat().st_mtime_ns
    check.tree.copy(root, to, skip=[root / "out"])
    assert {str(p) for p in files_below(to)} == {"a.py", "b/c.py", "b/_C.so"}
    assert (to / "a.py").read_text() == "new" and (to / "a.py").stat().st_mtime > 0
    assert (to / "b" / "c.py").stat().st_mtime_ns == kept

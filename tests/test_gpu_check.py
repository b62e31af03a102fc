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
from types import SimpleNamespace

import pytest

from tests import conftest

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
    due = {name for part in check.main.LIMITS for name in check.report.OF_PART[part]}
    assert {str(p) for p in files} == due | set(check.report.SUMMARY) and len(files) <= 8
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
    assert not alive(int((out / "child").read_text()))


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


def alive(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


def test_what_a_part_leaves_behind_is_ended(driver, capsys):
    """In a session of its own, as compile workers are: it would keep the device's memory."""
    leaves = """
import pathlib, subprocess, sys
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
child = subprocess.Popen(sleep, start_new_session=True)
pathlib.Path(sys.argv[1], "child").write_text(str(child.pid))
"""
    code, summary, out = driver({"tests": leaves, "ops": "print('ran')\n"})
    assert code == 0
    assert not alive(int((out / "child").read_text()))
    assert "1 processes of it were still there" in capsys.readouterr().out


def test_no_part_goes_past_the_end_of_the_whole(driver, check, monkeypatch):
    """Whatever the limits of the parts add up to."""
    monkeypatch.setattr(check.main, "TOTAL", 4.0)
    monkeypatch.setattr(check.main, "ENDING", 0.5)
    started = time.monotonic()
    sleeps = dict.fromkeys(("build", "tests", "ops"), "import time\ntime.sleep(60)\n")
    _, summary, _ = driver(sleeps)
    assert time.monotonic() - started < 12
    assert [p["status"] for p in summary["parts"]] == ["out of time"] * 3


def test_the_summary_is_there_when_the_run_is_killed(driver, check, monkeypatch, tmp_path):
    """By SIGKILL, which nothing can answer."""
    seen = tmp_path / "seen.json"
    looks = (
        "import pathlib, sys\n"
        f"pathlib.Path({str(seen)!r}).write_text(pathlib.Path(sys.argv[1], 'gpu_check.json')"
        ".read_text())\n"
    )
    driver({"build": "print('built')\n", "tests": looks})
    summary = json.loads(seen.read_text())
    assert [(p["name"], p["status"]) for p in summary["parts"]] == [("build", "ok")]


def test_a_folder_that_cannot_be_written_is_named(driver, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit):
        driver({"build": ""})
    assert "cannot write to OUT and build/" in capsys.readouterr().err


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


def test_one_part_leaves_what_the_others_have_measured(driver):
    """But does not take it for its own."""
    measures = "import pathlib, sys\npathlib.Path(sys.argv[1], '%s.jsonl').write_text('kept')\n"
    driver({"ops": measures % "ops", "ppo": measures % "ppo", "sanitizer": "print('not run: x')"})
    _, summary, out = driver({"tests": "", "ppo": ""}, "--only", "tests", "--only", "ppo")
    assert (out / "ops.jsonl").read_text() == "kept" and not (out / "ppo.jsonl").exists()
    assert (out / "sanitizer.log").exists() and summary["sanitizer"] is None
    assert summary["ops"] == [] and summary["tests"] == {}


def test_tune_runs_only_where_it_is_asked_for(driver):
    limits = {"ops": 20}
    parts = {"ops": "", "tune": "print('tuned')\n"}
    code, summary, out = driver(parts, "--only", "tune", limits=limits)
    assert code == 0 and [p["name"] for p in summary["parts"]] == ["tune"]
    assert (out / "tune.log").read_text() == "tuned\n"
    _, summary, _ = driver(parts, limits=limits)
    assert [p["name"] for p in summary["parts"]] == ["ops"]


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
    records = [record("gae", "cuda", None, status="wrong"), record("gae", "eager", 1.0),
               record("gae", "reference", 0.5)]  # fmt: skip
    (row,) = check.report.op_rows(records)
    assert row["ours"] == "wrong" and row["ours ms"] is None and row["best peer"] == "eager"
    text = check.report.table(check.report.OP_COLUMNS, [row]).splitlines()[-1].split()
    assert text[-2:] == ["-", "-"]


def test_a_line_that_was_cut_short_is_left_out(check, tmp_path):
    path = tmp_path / "ops.jsonl"
    path.write_text(json.dumps(CEILINGS[0]) + "\n" + json.dumps(CEILINGS[1])[:40])
    assert check.report.read_records(path) == CEILINGS[:1]


SUITE = """
import os, time
import pytest

@pytest.mark.parametrize("n", range(3))
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_first(backend, n):
    pass

def test_fails():
    assert 1 == 2

def test_loses_the_device():
    os.environ["LOST"] = "1"

@pytest.mark.skip(reason="needs two GPUs")
def test_of_two():
    pass

def test_last():
    pass
"""
CONFTEST = """
import os
from tests.lost_device import LostDevice

def synchronize():
    if "LOST" in os.environ:
        raise RuntimeError("an illegal memory access was encountered")

def pytest_configure(config):
    worker = hasattr(config, "workerinput")
    config.pluginmanager.register(LostDevice(synchronize, worker))
"""


def run_suite(check, folder, *args):
    (folder / "test_suite.py").write_text(SUITE)
    (folder / "conftest.py").write_text(CONFTEST)
    record = folder / "record.jsonl"
    env = {**os.environ, "GPU_CHECK_RECORD": str(record), "PYTHONPATH": f"{FOLDER}:{ROOT}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "record_tests", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *args], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    return check.report.test_counts(record), done.stdout, record


def test_counts_of_the_tests_and_which_one_lost_the_device(check, tmp_path):
    """In one process those after it are skipped, and say because of what."""
    counts, said, record = run_suite(check, tmp_path)
    # Each function on each backend comes before any has its second parameters.
    started = [e["started"] for e in map(json.loads, record.open()) if "started" in e]
    assert [s.split("::")[1] for s in started] == [
        "test_first[cuda-0]", "test_first[triton-0]", "test_fails", "test_loses_the_device",
        "test_of_two", "test_last", "test_first[cuda-1]", "test_first[triton-1]",
        "test_first[cuda-2]", "test_first[triton-2]",
    ]  # fmt: skip
    lost = "test_suite.py::test_loses_the_device"
    assert [f["test"] for f in counts["failures"]] == ["test_suite.py::test_fails", lost]
    assert counts["failures"][0]["said"] == "assert 1 == 2"
    assert "has lost the CUDA context: an illegal memory access" in counts["failures"][1]["said"]
    assert (counts["collected"], counts["passed"], counts["failed"]) == (10, 2, 2)
    assert counts["skips"] == {f"Skipped: the CUDA context was lost in {lost}": 6}
    assert counts["not reached"] == 0 and counts["running when stopped"] == []
    assert "FAILED test_suite.py::test_fails (call)" in said and "assert 1 == 2" in said


def test_a_worker_that_lost_the_device_is_replaced(check, tmp_path):
    pytest.importorskip("xdist")
    counts, _, _ = run_suite(check, tmp_path, "-n", "1", "--dist", "load", "--maxschedchunk", "1")
    lost = "test_suite.py::test_loses_the_device"
    assert [f["test"] for f in counts["failures"]] == ["test_suite.py::test_fails", lost]
    assert "has lost the CUDA context" in counts["failures"][1]["said"]
    assert (counts["passed"], counts["failed"]) == (7, 2)
    assert counts["skips"] == {"Skipped: needs two GPUs": 1}


def test_counts_of_a_run_that_was_cut_short(check, tmp_path):
    path = tmp_path / "tests.jsonl"
    events = [{"collected": 9}, {"started": "a"}, {"started": "b"},
              {"test": "a", "outcome": "passed", "seconds": 1.0},
              {"test": "a", "outcome": "failed", "when": "teardown", "said": "left something"},
              {"started": "c"}]  # fmt: skip
    path.write_text("".join(json.dumps(e) + "\n" for e in events) + '{"test": "b", "outc')
    counts = check.report.test_counts(path)
    assert (counts["passed"], counts["failed"], counts["not reached"]) == (0, 1, 6)
    assert counts["running when stopped"] == ["b", "c"]
    assert check.report.test_counts(tmp_path / "missing.jsonl") == {}
    summary = {
        "device": None, "commit": "abc", "seconds": 1.0, "parts": [], "tests": counts,
        "dry_run": False, "sanitizer": None, "ceilings": {}, "ops": [], "ppo": [],
        "problems": [check.report.problem(
            record("gae", "cuda", None, status="wrong") | {"why": "output 0 differs"}
        )],
    }  # fmt: skip
    said = check.report.text(summary)
    assert "0 passed, 1 failed, 0 skipped, 6 not reached" in said
    assert "    a: left something" in said and "running when stopped: c" in said
    assert "wrong: gae fwd cuda bfloat16 M=8: output 0 differs" in said


@pytest.mark.parametrize(
    ("path", "params", "device", "expected"),
    [
        ("tests/ops/test_gae.py", {"backend": "triton"}, None, True),
        ("tests/ops/test_gae.py", {"backend": "cuda"}, None, True),
        ("tests/ops/test_gae.py", {"backend": "cpu"}, None, False),
        ("tests/ops/test_gae.py", None, None, False),
        ("tests/ops/test_lora_linear_triton.py", None, "cuda", True),
        ("tests/ops/test_lora_linear_triton.py", None, "cpu", False),
        # named "cuda", run on the CPU by the emulator
        ("tests/cuda_on_cpu/test_ops.py", {"backend": "cuda"}, None, False),
    ],
)
def test_what_runs_on_a_gpu_where_there_is_one(path, params, device, expected):
    item = SimpleNamespace(path=Path(path), module=SimpleNamespace(DEVICE=device))
    if params is not None:
        item.callspec = SimpleNamespace(params=params)
    assert conftest.runs_on_a_gpu(item) is expected


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

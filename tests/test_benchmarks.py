"""The harness: what it times and refuses to time, what it writes down, how two runs compare."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, measure, tables
from benchmarks.__main__ import main
from benchmarks.harness import Absent, Options, Record, Shape, Work

ROOT = Path(__file__).parents[1]
SIZE = Shape({"N": 4}, "small", quick=True)
THREE = measure.Effort(rounds=3, seconds=1.0)


def toy(rows, **more):
    """A benchmark of adding one to zeros."""
    bench = dict(
        OP="toy",
        MODES=("fwd",),
        SHAPES={"cpu": [SIZE, Shape({"N": 9}, "another")]},
        DTYPES={"cpu": (torch.float32,)},
        PEERS=tuple(rows),
        inputs=lambda shape, dtype, device: torch.zeros(shape.sizes["N"], dtype=dtype),
        calls=lambda x, mode: {name: (lambda f=f: f(x)) if callable(f) else f
                               for name, f in rows.items()},
        check=lambda x, mode, row, out: harness.differs([out], [x.double() + 1]),
        work=lambda shape, dtype, mode: Work(bytes=8 * shape.sizes["N"], flops=shape.sizes["N"]),
    )  # fmt: skip
    return SimpleNamespace(**{**bench, **more})


def run_toy(bench, **options):
    options = Options(**{"effort": THREE, **options})
    rows = harness.run_rows(bench, SIZE, torch.float32, "fwd", options)
    return {r.backend: r for r in rows}


def test_only_right_answers_get_a_time():
    def broken(x):
        raise RuntimeError("out of something\nand more")

    def nan(x):
        return x + float("nan")

    records = run_toy(
        toy({
            "right": lambda x: x + 1,
            "wrong": lambda x: x + 1.01,
            "nan": nan,
            "broken": broken,
            "absent": Absent("not installed"),
        })
    )  # fmt: skip
    assert {k: r.status for k, r in records.items()} == {
        "right": "ok", "wrong": "wrong", "nan": "wrong", "broken": "failed", "absent": "absent"
    }  # fmt: skip
    assert [k for k, r in records.items() if r.ms is not None] == ["right"]
    assert records["broken"].why == "RuntimeError: out of something"
    assert "relative error 1.00e-02" in records["wrong"].why
    assert records["absent"].why == "not installed"


def test_a_shape_may_have_dtypes_of_its_own(monkeypatch):
    wide = replace(SIZE, dtypes=(torch.float64, torch.bfloat16), quick=False)
    bench = toy({"right": lambda x: x + 1}, SHAPES={"cpu": [SIZE, wide]})
    monkeypatch.setattr(harness, "names", lambda: ["bench_toy"])
    monkeypatch.setattr(harness, "load", lambda name: [bench])
    found = [r.dtype for r in harness.run(Options(effort=THREE))]
    assert found == ["float32", "float64", "bfloat16"]
    assert [r.dtype for r in harness.run(Options(effort=THREE, quick=True))] == ["float32"]


def test_a_record_says_where_it_was_made():
    record = run_toy(toy({"right": lambda x: x + 1}))["right"]
    assert record.repeats == 3
    assert record.ms_p20 <= record.ms <= record.ms_p80
    assert record.gb_per_s == pytest.approx(32 / record.ms / 1e6)
    assert record.tflop_per_s == pytest.approx(4 / record.ms / 1e9)
    assert record.versions["torch"] == torch.__version__
    assert record.threads == torch.get_num_threads()
    assert record.device and record.commit and len(record.date) == 10
    assert record.timing == "wall" and record.host_us is None


def test_inputs_that_cannot_be_made_fail_every_row():
    def inputs(*_):
        raise ValueError("no room")

    records = run_toy(toy({"a": lambda x: x, "b": lambda x: x}, inputs=inputs))
    assert {r.why for r in records.values()} == {"ValueError: no room"}
    assert [r.status for r in records.values()] == ["failed", "failed"]


def test_rows_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    ms, host, failures = measure.time_calls(calls, "cpu", measure.Effort(5, 1e3))
    assert "".join(order) == "aaaabbbb" + 5 * "ab"  # warm-up, then rounds
    assert [len(v) for v in ms.values()] == [5, 5] and not failures


def test_a_slow_row_gets_fewer_rounds_and_a_late_failure_is_kept():
    calls_made = []

    def fails_late():
        calls_made.append(1)
        if len(calls_made) > 6:
            raise RuntimeError("late")

    calls = {"slow": lambda: time.sleep(0.02), "late": fails_late}
    ms, _, failures = measure.time_calls(calls, "cpu", measure.Effort(9, 0.05))
    assert len(ms["slow"]) == 3  # never fewer
    assert failures == {"late": "RuntimeError: late"}


def test_a_call_of_seconds_is_made_as_often_as_it_must_be(monkeypatch):
    monkeypatch.setattr(measure, "SLOW", 0.04)
    made = {"slow": 0, "middling": 0}

    def sleeps(name, seconds):
        made[name] += 1
        time.sleep(seconds)

    calls = {
        "slow": lambda: sleeps("slow", 0.05),
        "middling": lambda: sleeps("middling", 0.03),
    }
    ms, _, failures = measure.time_calls(calls, "cpu", measure.Effort(9, 0.0))
    assert [len(ms[name]) for name in calls] == [2, 3] and not failures
    assert made == {"slow": 1 + 2, "middling": 1 + 3}  # one to warm up, then rounds


def test_shapes_by_their_sizes(capsys):
    some = harness.Shape({"M": 8, "V": 3}, "")
    assert some.has({"V": 3}) and some.has({}) and not some.has({"V": 3, "M": 9})
    assert not some.has({"K": 1})
    args = ["--op", "linear_logprob", "--device", "cpu", "--row", "cpu", "--mode", "fwd"]
    assert main([*args, "--rounds", "1", "--shape", "M=256 V=8000"]) == 0
    said = capsys.readouterr().out
    assert "M=256 D=256 V=8000" in said and "V=32000" not in said


def test_an_interrupt_reports_every_row(monkeypatch):
    calls_made = []

    def stopped(x):
        calls_made.append(1)
        if len(calls_made) > 2:  # not in the check
            raise KeyboardInterrupt
        return x + 1

    bench = toy({"fine": lambda x: x + 1, "stopped": stopped})
    monkeypatch.setattr(harness, "names", lambda: ["bench_toy"])
    monkeypatch.setattr(harness, "load", lambda name: [bench])
    records = []
    with pytest.raises(KeyboardInterrupt):
        for record in harness.run(Options(effort=THREE)):
            records.append(record)
    assert [(r.shape["N"], r.status) for r in records] == [
        (4, "interrupted"), (4, "interrupted"), (9, "not reached"), (9, "not reached")
    ]  # fmt: skip


def test_past_the_deadline_nothing_is_dropped():
    records = run_toy(toy({"a": lambda x: x + 1}), deadline=time.monotonic() - 1)
    assert records["a"].status == "not reached"


def test_a_module_that_does_not_import_is_a_failed_row(monkeypatch):
    def load(name):
        raise ImportError("no such peer")

    monkeypatch.setattr(harness, "names", lambda: ["bench_toy"])
    monkeypatch.setattr(harness, "load", load)
    (record,) = harness.run(Options())
    assert (record.op, record.status, record.why) == ("toy", "failed", "ImportError: no such peer")


def test_end_to_end_records_pass_through_and_failures_are_reported(monkeypatch):
    def run(options):
        yield Record.of("e2e", "ppo", "ours", SIZE, torch.float32, "cpu", figures={"seconds": 2.0})
        raise RuntimeError("the second half")

    monkeypatch.setattr(harness, "names", lambda: ["bench_e2e"])
    monkeypatch.setattr(harness, "load", lambda name: [SimpleNamespace(OP="e2e", run=run)])
    assert list(harness.run(Options())) == []  # takes minutes: only when it is named
    first, second = harness.run(Options(ops=("e2e",)))
    assert first.figures == {"seconds": 2.0} and first.status == "ok"
    assert (second.status, second.why) == ("failed", "RuntimeError: the second half")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's high-water mark of memory")
def test_peak_memory_is_what_a_call_holds_at_once():
    """In a process of its own: blocks that earlier tests freed would serve without being new."""
    code = """
import torch
from benchmarks import measure

for mib in (1, 12, 100):
    def two_of_three():
        a = torch.ones(mib * 2**18)
        b = torch.ones(mib * 2**18)
        del a  # leaves a hole that the next does not fit into
        return b, torch.ones(3 * mib * 2**17)

    measure.peak_mib(two_of_three, "cpu")  # code is paged in
    print(measure.peak_mib(two_of_three, "cpu") / mib, measure.peak_mib(lambda: None, "cpu"))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for mib, line in zip((1, 12, 100), out.stdout.splitlines(), strict=True):
        held, nothing = map(float, line.split())
        assert held == pytest.approx(2.5, abs=0.5 / mib)
        assert nothing < 0.5


def test_relative_error_never_passes_what_is_not_a_number():
    exact = torch.ones(3, dtype=torch.float64)
    assert harness.relative_error(exact * 1.5, exact) == pytest.approx(0.5)
    assert harness.relative_error(exact * float("nan"), exact) == float("inf")
    assert harness.relative_error(torch.ones(4), exact) == float("inf")
    assert harness.differs([exact], [exact, exact]) == "1 outputs where 2 are due"


def record(backend="cpu", ms=1.0, spread=0.1, status="ok", **rest):
    if ms is None:
        return Record("toy", "fwd", backend, {"N": 4}, "float32", status, **rest)
    return Record("toy", "fwd", backend, {"N": 4}, "float32", status, ms=ms,
                  ms_p20=ms - spread, ms_p80=ms + spread, **rest)  # fmt: skip


def test_records_survive_the_file(tmp_path):
    path = tmp_path / "out.jsonl"
    written = [record(figures={"bytes": 1.5}), record(ms=None, status="failed", why="x")]
    for r in written:
        harness.write(r, path)
    assert harness.read(path) == written
    path.write_text(path.read_text() + '\n{"op": "toy"}\n')
    with pytest.raises(ValueError, match=r"out\.jsonl:4: not a benchmark record"):
        harness.read(path)


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (record(ms=1.0), record(ms=1.15), ""),  # the ranges touch
        (record(ms=1.0), record(ms=1.25), "slower"),
        (record(ms=1.0), record(ms=0.75), "faster"),
        (record(ms=1.0), record(ms=2.0, spread=1.5), ""),  # a busy machine proves nothing
        (record(ms=1.0), record(ms=None, status="wrong"), "ok -> wrong"),
        (record(ms=None, status="absent"), record(ms=None, status="absent"), "absent"),
        (record(ms=1.0), None, "not run"),
        (None, record(ms=1.0), "new"),
    ],
)
def test_what_moved(old, new, verdict):
    (row,) = tables.compared_rows([old] if old else [], [new] if new else [])
    assert row[-1] == verdict
    if old and new and old.ms and new.ms:
        assert row[7] == f"{new.ms / old.ms:.2f}x"


def test_runs_that_are_not_alike_say_so():
    old = record(device="a", threads=2, versions={"torch": "2.11", "python": "3.12"})
    new = replace(old, device="b", versions={"torch": "2.13", "python": "3.12"})
    assert tables.differences([old], [old]) == []
    assert tables.differences([old], [new]) == [
        "device: a -> b", "versions: torch 2.11 -> torch 2.13"
    ]  # fmt: skip


def test_the_table_keeps_rows_without_a_time():
    rows = tables.record_rows(
        [record("base", ms=2.0), record("cpu", ms=3.0), record("peft", ms=None, status="failed",
         why="boom")], {"toy": "base"})  # fmt: skip
    assert [row[7] for row in rows] == ["1.00x", "1.50x", ""]
    assert rows[2][5] == "failed: boom"
    text = tables.plain("title", tables.COLUMNS, rows).splitlines()
    assert text[0] == "title" and len(text) == 6 and "failed: boom" in text[5]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0"), (1234.5, "1234"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"),
     (0.1234, "0.12"), (0.01234, "0.0123")],
)  # fmt: skip
def test_figures_have_three_digits(value, text):
    assert tables.figure(value) == text


@pytest.mark.parametrize("name", harness.names())
def test_every_benchmark_keeps_the_contract(name):
    """Each row is ours or declared, is right at a tiny size, and the work is counted."""
    for bench in harness.load(name):
        if hasattr(bench, "run"):
            continue
        for device in ("cpu", "cuda"):
            shapes = bench.SHAPES.get(device, [])
            assert all(shape.why for shape in shapes), "each shape has its reason"
            assert not shapes or any(shape.quick for shape in shapes)
        assert getattr(bench, "FLOOR", bench.PEERS[0]) in bench.PEERS
        rows = tuple(r for r in harness.rows_of(bench, "cpu") if "compile" not in r)  # seconds each
        options = Options(rows=rows, effort=THREE)
        shape = harness.tiny(bench, "cpu")
        own = [dtype for s in bench.SHAPES["cpu"] for dtype in s.dtypes]
        for dtype, mode in product({*bench.DTYPES["cpu"][:1], *own}, bench.MODES):
            given = bench.calls(bench.inputs(shape, dtype, "cpu"), mode)
            assert set(given) <= set(harness.rows_of(bench, "cpu"))
            records = list(harness.run_rows(bench, shape, dtype, mode, options))
            assert {r.backend for r in records} == set(rows)
            bad = [(r.backend, r.why) for r in records if r.status not in ("ok", "absent")]
            assert not bad
            work = bench.work(shape, dtype, mode)
            assert work.bytes > 0 or work.flops > 0


def test_the_command_runs_writes_and_compares(tmp_path, capsys):
    out = tmp_path / "new" / "out.jsonl"
    ask = ["--op", "ceilings", "--device", "cpu", "--quick", "--rounds", "3", "--mode", "copy"]
    assert main([*ask, "--json", str(out)]) == 0
    (measured,) = harness.read(out)
    assert measured.op == "ceilings" and measured.status == "ok"
    slow = replace(measured, ms=measured.ms / 9, ms_p20=measured.ms / 9, ms_p80=measured.ms / 9)
    old = tmp_path / "old.jsonl"
    harness.write(slow, old)
    assert main(["--show", str(out), "--compare", str(old)]) == 0
    shown = capsys.readouterr().out
    assert "9.00x" in shown and "slower" in shown


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--op", "nothing"], "no benchmark of nothing (known: "),
        (["--compare", "missing.jsonl"], "missing.jsonl"),
        (["--op", "gae", "--row", "nothing"], "no row nothing (known: "),
        (["--op", "gae", "--mode", "fwd+bwd"], "no mode fwd+bwd (known: fwd)"),
        (["--shape", "M"], "--shape: 'M' is not as 'M=1024 V=32000'"),
        (["--op", "gae", "--shape", "M=7"], "no shape with M=7 (known: B="),
        (["--rounds", "0"], "--rounds: 0 is not above 0"),
        (["--threads", "-1"], "--threads: -1 is not above 0"),
        (["--limit", "0"], "--limit: 0 is not above 0"),
        (["--limit", "soon"], "--limit: invalid float value: 'soon'"),
        (["--op", "gae", "--json", os.devnull + "/out"], "--json: "),
        (["--op", "gae", "--json", "."], "--json: [Errno 21] Is a directory"),
    ],
)
def test_bad_arguments_are_one_line(args, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "old.jsonl: not a file of benchmark records ("),
        (b'{"op": 1}\n', "old.jsonl:1: not a benchmark record ("),
        (
            b'{"op": "a", "mode": "", "backend": "b", "shape": 5, "dtype": ""}',
            "old.jsonl:1: not a benchmark record (shape is 5)",
        ),
    ],
)
def test_a_file_that_holds_no_records_is_named(content, said, tmp_path, capsys):
    (tmp_path / "old.jsonl").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main(["--compare", str(tmp_path / "old.jsonl")])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_time_without_its_spread_has_not_moved():
    """As a record may lack it that something else has written."""
    bare = Record("toy", "fwd", "cpu", {"N": 4}, "float32", ms=1.0)
    slow = replace(bare, ms=9.0, ms_p20=8.0, ms_p80=10.0)
    (row,) = tables.compare([bare], [slow])
    assert row["verdict"] == "no spread" and row["ratio"] == 9.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_why_there_is_no_gpu_is_said(capsys):
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--device cuda: torch sees no CUDA device: " in said and "Error: " in said


def test_what_this_torch_does_not_have_is_absent_and_no_failure(monkeypatch):
    """torch 2.11 has no linear_cross_entropy."""
    bench = harness.load("bench_linear_logprob")[0]
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    inputs = bench.inputs(harness.tiny(bench, "cpu"), torch.float32, "cpu")
    row = bench.calls(inputs, "fwd")["linear_cross_entropy (logprob only)"]
    assert isinstance(row, Absent) and row.why.endswith("has no linear_cross_entropy")


def test_a_wrong_row_is_the_commands_failure(monkeypatch, capsys):
    monkeypatch.setattr(harness, "names", lambda: ["bench_toy"])
    monkeypatch.setattr(harness, "load", lambda name: [toy({"wrong": lambda x: x})])
    assert main(["--device", "cpu", "--quick"]) == 1
    assert "wrong: toy fwd wrong N=4" in capsys.readouterr().err


def test_a_terminated_run_keeps_its_records(tmp_path):
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "--op", "ceilings", "--device", "cpu", "--rounds",
         "100000", "--mode", "product", "--json", str(out)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stderr.readline().startswith("ceilings product N=2048")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert [r.status for r in harness.read(out)] == ["interrupted"]


def test_pytest_benchmark_runs_the_same_rows():
    pytest.importorskip("pytest_benchmark")
    # pytest-benchmark times nothing where it believes to be one of xdist's workers.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         "benchmarks/", "--benchmark-only", "-k", "ceilings and copy", "--bench-device", "cpu"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout and "Median" in done.stdout


def test_results_are_whole():
    """What is checked in can be read, names its machine, and came from committed code."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")):
        for r in harness.read(path):
            assert r.device and r.commit and r.date and r.versions, path
            assert not r.commit.endswith("-dirty"), path


def test_the_weights_of_end_to_end_runs_are_drawn_on_the_device():
    """On a host those of a 7b take minutes; a device without storage shows where they are."""
    from benchmarks import bench_ppo_methods, bench_rollout

    pytest.importorskip("peft")
    ours, theirs = bench_rollout.models("meta", bench_rollout.SMALL, torch.bfloat16)
    source = bench_ppo_methods.source_of(bench_ppo_methods.QUICK, torch.bfloat16, "meta")
    for model in (ours.base, theirs, source.base, source.reward_head):
        weights = [p for name, p in model.named_parameters() if "lora_" not in name]
        assert {p.device.type for p in weights} == {"meta"}
    here = bench_ppo_methods.source_of(bench_ppo_methods.QUICK, torch.float32, "cpu")
    assert torch.equal(here.reward_head.weight, here.value_head.weight)
    assert here.reward_head.weight.any()


def test_rollouts_past_the_deadline_are_not_reached():
    from benchmarks import bench_rollout

    options = Options(device="cpu", deadline=time.monotonic() - 1.0)
    assert {r.status for r in bench_rollout.run(options)} == {"not reached"}


@pytest.mark.parametrize(
    ("dtype", "apart", "alike"),
    [
        (torch.float32, 1e-4, True),
        (torch.float32, 0.01, False),
        (torch.bfloat16, 0.2, True),  # tokens drawn otherwise
        (torch.bfloat16, 2.0, False),
        (torch.bfloat16, float("nan"), False),
    ],
)
def test_methods_that_train_alike_must_compute_alike(dtype, apart, alike):
    from benchmarks.bench_ppo_methods import disagreement

    names = ("objective/scores", "objective/kl", "loss/value_avg")
    rows = [
        SimpleNamespace(name=name, metrics=dict.fromkeys(names, 1.0 + off))
        for name, off in (("lora-ppo", 0.0), ("hydra-ppo", apart), ("ppo", 9.0))
    ]
    assert (disagreement(rows, dtype) == "") == alike


def test_a_failed_capture_leaves_the_current_stream(monkeypatch):
    """torch's own context does not get as far as putting it back."""
    made = [SimpleNamespace(wait_stream=lambda other: None) for _ in range(2)]
    now = [made[0]]

    class Graph:
        def __init__(self, graph):
            pass

        def __enter__(self):
            now[0] = made[1]

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "Stream", lambda: made[1])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: now.__setitem__(0, stream))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    with pytest.raises(RuntimeError, match="during capture"):
        measure.graphed(lambda: None)
    assert now[0] is made[0]

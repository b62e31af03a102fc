"""The run folder refuses what it must and records what it is given."""

import importlib.machinery
import importlib.util
import json
import math
import sys
import time
import types
from typing import ClassVar

import pytest
import torch
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from rich.console import Console

from hydra_rlhf.commands.inputs import OutputConfig
from hydra_rlhf.errors import UserError
from hydra_rlhf.records import Tracker, check_run_dir, open_run_dir, plain, read_metrics


def finished_run(path):
    with Tracker(open_run_dir(path), {"seed": 3}) as tracker:
        tracker.log(1, {"loss": 1.0}, "sft")
    return path


def test_an_empty_or_missing_folder_is_taken(tmp_path):
    assert open_run_dir(tmp_path / "a" / "b").is_dir()
    assert open_run_dir(tmp_path / "a" / "b").is_dir()


def test_another_run_is_refused_and_kept(tmp_path):
    run = finished_run(tmp_path / "run")
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="already holds a run .*--overwrite"):
        open_run_dir(run)
    assert (run / "metrics.jsonl").read_text() == before


def test_overwrite_empties_a_run(tmp_path):
    run = finished_run(tmp_path / "run")
    assert list(open_run_dir(run, overwrite=True).iterdir()) == []


def test_overwrite_never_deletes_what_is_not_a_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no run"):
        open_run_dir(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def failed_run(path, steps=0, **kwargs):
    with pytest.raises(ZeroDivisionError), Tracker(path, {"seed": 3}, **kwargs) as tracker:
        for step in range(steps):
            tracker.log(step + 1, {"loss": 1.0}, "sft")
        tracker.log_samples(1, [{"prompt": "p"}], "ppo")
        raise ZeroDivisionError
    return path


@pytest.mark.parametrize("made", ["actor", "joint", "model"])
def test_a_finished_run_without_a_checkpoint_is_not_begun_anew(made, tmp_path):
    """--resume on it would train from the first step and replace what it had learnt."""
    run = open_run_dir(tmp_path / "run")
    with Tracker(run) as tracker:
        tracker.log(1, {"loss": 1.0}, "sft")
    check_run_dir(run, resume=True)  # it ended before its first checkpoint: from the start
    (run / made).mkdir()
    (run / "checkpoints").mkdir()
    with pytest.raises(UserError, match="finished run and no checkpoint .*--save-steps"):
        open_run_dir(run, resume=True)
    check_run_dir(run, overwrite=True)
    (run / "checkpoints" / "step-00000001").mkdir()
    check_run_dir(run, resume=True)


def test_a_run_that_failed_before_its_first_step_is_replaced(tmp_path):
    run = failed_run(open_run_dir(tmp_path / "run"))
    assert (run / "run.json").exists()
    check_run_dir(run)
    assert list(open_run_dir(run).iterdir()) == []
    failed_run(run)
    open_run_dir(run, resume=True)  # which keeps it, and may go on
    assert (run / "run.json").exists()
    with Tracker(run, resume=True) as tracker:
        tracker.log(1, {"loss": 1.0}, "sft")
    with pytest.raises(UserError, match="already holds a run"):
        open_run_dir(run)


def test_a_run_that_failed_and_left_something_is_kept(tmp_path):
    """A step, a checkpoint or a batch at fault, or what came into the folder later."""
    with_steps = failed_run(open_run_dir(tmp_path / "steps"), steps=1)
    (open_run_dir(tmp_path / "fault") / "faults").mkdir()
    with_fault = failed_run(tmp_path / "fault")
    later = failed_run(open_run_dir(tmp_path / "later"))
    (later / "notes.txt").write_text("x")
    (open_run_dir(tmp_path / "killed") / "run.json").write_text("[]")
    for run in (with_steps, with_fault, later, tmp_path / "killed"):
        with pytest.raises(UserError, match="already holds a run"):
            open_run_dir(run)


def test_a_tracker_that_does_not_start_leaves_a_folder_that_can_be_used(tmp_path):
    with pytest.raises(UserError, match="unknown tracker"):
        Tracker(open_run_dir(tmp_path / "run"), log_with=("nonsense",))
    assert list(open_run_dir(tmp_path / "run").iterdir()) == []


def test_overwrite_does_not_follow_links(tmp_path):
    run = finished_run(tmp_path / "run")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (run / "link").symlink_to(tmp_path / "kept")
    open_run_dir(run, overwrite=True)
    assert (tmp_path / "kept" / "file").exists()


@pytest.mark.parametrize("options", [{"resume": True}, {"resume": True, "overwrite": True}])
def test_resume_needs_a_run(tmp_path, options):
    with pytest.raises(UserError):
        open_run_dir(tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        check_run_dir(tmp_path / "file")


def test_metrics_are_strict_json_with_stage_step_and_time(tmp_path):
    with Tracker(open_run_dir(tmp_path / "run"), None) as tracker:
        tracker.log(1, {"loss": torch.tensor(0.5), "bad": math.nan, "count": 3}, "sft")
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in line
    record = json.loads(line)
    assert record.pop("time") >= 0
    assert record == {"stage": "sft", "step": 1, "loss": 0.5, "bad": None, "count": 3}


def test_resume_appends(tmp_path):
    run = finished_run(tmp_path / "run")
    with Tracker(open_run_dir(run, resume=True), None, resume=True) as tracker:
        tracker.log(2, {"loss": 0.5}, "sft")
    assert [line["step"] for line in read_metrics(run)] == [1, 2]
    assert "seed: 3" in (run / "config.yaml").read_text()


def test_a_stage_that_goes_on_leaves_the_others(tmp_path):
    with Tracker(open_run_dir(tmp_path / "run")) as tracker:
        for stage in ("sft", "ppo"):
            for step in (1, 2, 3):
                tracker.log(step, {}, stage)
    with Tracker(tmp_path / "run", resume=True) as tracker:
        tracker.log(2, {}, "ppo")
    lines = [(line["stage"], line["step"]) for line in read_metrics(tmp_path / "run")]
    assert lines == [("sft", 1), ("sft", 2), ("sft", 3), ("ppo", 1), ("ppo", 2)]


def test_seconds_of_a_run_that_goes_on(tmp_path, monkeypatch, capsys):
    """They go on from the step before, and what is left is reckoned by the steps made since."""
    clock = {"now": 1000.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])

    def run(steps, resume):
        with Tracker(tmp_path, None, resume=resume) as tracker:
            with tracker.progress("PPO", 10) as bar:
                for step in steps:
                    clock["now"] += 4.0
                    tracker.log(step, {"kl": 0.1}, "ppo")
                    bar.update(step)

    run([1, 2, 3], resume=False)
    clock["now"] = 50.0  # of another process, which has a clock of its own
    run([3, 4], resume=True)
    assert [line["time"] for line in read_metrics(tmp_path)] == [4.0, 8.0, 12.0, 16.0]
    lines = [line for line in capsys.readouterr().out.splitlines() if "/10" in line]
    assert ["28 s left" in line for line in lines] == [False, False, True, True, False]
    assert "24 s left" in lines[-1]


def test_a_line_cut_by_a_crash_is_left_out(tmp_path):
    run = finished_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"stage": "sf')
    assert len(read_metrics(run)) == 1


def test_tensorboard_events_hold_the_same_figures(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is an extra"
    )
    run = finished_run(tmp_path / "run")
    events = accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("sft/loss")] == [(1, 1.0)]


def test_off_a_terminal_progress_is_a_few_plain_lines(capsys):
    tracker = Tracker(None)
    with tracker.progress("Hydra-SFT", 200) as bar:
        for step in range(1, 201):
            bar.update(step, loss=2.0 / step)
    out = capsys.readouterr().out
    assert out.isprintable() or all(c.isprintable() or c == "\n" for c in out)
    lines = out.splitlines()
    assert 5 <= len(lines) <= 12
    assert "200/200" in lines[-1] and "loss 0.010" in lines[-1]


def test_off_a_terminal_a_long_run_shows_every_ten_minutes_that_it_lives(capsys, monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    with Tracker(None).progress("PPO", 100_000) as bar:
        for step in range(1, 62):  # a minute each, all within the first tenth
            clock["now"] += 60.0
            bar.update(step)
    shown = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert shown == [1, 11, 21, 31, 41, 51, 61]


def test_on_a_terminal_progress_is_a_bar():
    console = Console(force_terminal=True, width=100, record=True)
    tracker = Tracker(None, console=console)
    with console.capture() as captured, tracker.progress("Hydra-PPO", 2) as bar:
        bar.update(2, reward=0.25)
    assert "2/2" in captured.get() and "0.250" in captured.get()


@pytest.mark.parametrize(
    ("each", "expected"),
    [(4.0, ["00:12", "00:08", "00:04", "00:16"]), (400.0, ["20:00", "13:20", "06:40", "26:40"])],
    ids=["quick", "slow"],
)
def test_on_a_terminal_time_left_is_reckoned_by_the_steps_made(each, expected, monkeypatch):
    """After a resume too, and where a step takes minutes; at the end it is the time taken."""
    clock = {"now": 1000.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    console = Console(force_terminal=True, width=100)
    shown = []
    with Tracker(None, console=console).progress("PPO", 10) as bar:
        for step in (7, 8, 9, 10):  # 6 were made before
            clock["now"] += each
            with console.capture() as captured:
                bar.update(step, kl=0.1)
                bar._bar.refresh()
            shown.append(captured.get())
    assert [told in line for told, line in zip(expected, shown, strict=True)] == [True] * 4


def test_on_a_terminal_hours_are_told_apart(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    console = Console(force_terminal=True, width=100)
    with console.capture() as captured, Tracker(None, console=console).progress("PPO", 3) as bar:
        bar.update(0)
        bar._bar.refresh()
        clock["now"] = 3661.0
        bar.update(1)
    assert "--:--" in captured.get() and "2:02:02" in captured.get()


def test_config_is_plain_values(tmp_path):
    assert plain({"path": tmp_path, "pair": (1, None)}) == {
        "path": str(tmp_path),
        "pair": [1, None],
    }


# accelerate's trackers


ABSENT = sorted(str(getattr(name, "value", name)) for name in tracking.LOGGER_TYPE_TO_CLASS)


class Remembers(GeneralTracker):
    """A tracker as a user would register one, which wants a folder."""

    name = "remembers"
    requires_logging_directory = True
    made: ClassVar[list] = []

    def __init__(self, run_name, logging_dir, **kwargs):
        super().__init__()
        self.said = [("made", run_name, logging_dir)]
        self.made.append(self)

    @property
    def tracker(self):
        return self.said

    def start(self):
        self.said.append(("start",))

    def store_init_configuration(self, values):
        self.said.append(("settings", values))

    def log(self, values, step=None, **kwargs):
        self.said.append(("log", step, values))

    def finish(self):
        self.said.append(("finish",))


@pytest.fixture
def remembers(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "remembers", Remembers)
    monkeypatch.setattr(Remembers, "made", [])
    return Remembers.made


def test_a_tracker_hears_everything_once_and_in_order(remembers, tmp_path):
    folder = open_run_dir(tmp_path / "run")
    settings = {"ppo": {"seed": 3, "stop": None, "layers": [1, 2]}, "output": {"dir": tmp_path}}
    with Tracker(folder, settings, log_with=("remembers",)) as tracker:
        tracker.log(1, {"loss": torch.tensor(0.5), "bad": math.nan}, "sft")
        tracker.log(1, {"kl": 2}, "ppo")
    (one,) = remembers
    assert one.said == [
        ("made", "run", str(folder)),
        ("start",),
        ("settings", {"ppo.seed": 3, "ppo.layers": "[1, 2]", "output.dir": str(tmp_path)}),
        ("log", 1, {"sft/loss": 0.5}),
        ("log", 2, {"ppo/kl": 2}),
        ("finish",),
    ]


def test_a_tracker_goes_on_after_a_resume_at_the_step_that_is_said_again(remembers, tmp_path):
    folder = open_run_dir(tmp_path / "run")
    with Tracker(folder, None) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"kl": step}, "ppo")
    with Tracker(folder, None, resume=True, log_with=("remembers",)) as tracker:
        tracker.log(3, {"kl": 9}, "ppo")
    assert ("log", 3, {"ppo/kl": 9}) in remembers[0].said


def test_only_the_first_process_tracks(remembers, tmp_path):
    with Tracker(tmp_path, None, log_with=("remembers",), is_main=False) as tracker:
        tracker.log(1, {"loss": 1.0}, "sft")
    assert not remembers and not list(tmp_path.iterdir())


def test_wandb_by_accelerate(monkeypatch, tmp_path):
    """accelerate's own tracker over a stand-in for the package."""
    said = []

    class Run:
        def log(self, values, step=None):
            said.append(("log", step, values))

        def finish(self):
            said.append(("finish",))

    class Config:
        def update(self, values, allow_val_change=False):
            said.append(("config", values))

    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda project, **kwargs: said.append(("init", project)) or Run()
    wandb.config = Config()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    OutputConfig(str(tmp_path / "new"), log_with="wandb").check()
    folder = open_run_dir(tmp_path / "my-run")
    with Tracker(folder, {"ppo": {"seed": 3}}, log_with=("wandb",)) as tracker:
        tracker.log(7, {"objective/kl": 0.25}, "ppo")
    assert said == [
        ("init", "my-run"),
        ("config", {"ppo.seed": 3}),
        ("log", 1, {"ppo/objective/kl": 0.25}),
        ("finish",),
    ]


def test_wandb_itself_without_a_network(monkeypatch, tmp_path):
    """What it writes is in the run folder, and its key is not among it."""
    pytest.importorskip("wandb", reason="wandb is a development extra")
    key = "0123456789abcdef0123456789abcdef01234567"
    for name, value in dict(MODE="offline", SILENT="true", API_KEY=key).items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = open_run_dir(tmp_path / "my-run")
    with Tracker(folder, {"ppo": {"seed": 3}}, log_with=("wandb",)) as tracker:
        tracker.log(7, {"objective/kl": 0.25}, "ppo")
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    expected = b"my-run", b"ppo.seed", b"ppo/objective/kl", b"0.25"
    until = time.monotonic() + 30  # a process of its own writes, which finish() does not await
    while not all(part in file.read_bytes() for part in expected):
        assert time.monotonic() < until, file.read_bytes()
        time.sleep(0.1)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not any(key.encode() in path.read_bytes() for path in files)
    assert not list((tmp_path / "here").iterdir())


def test_tensorboard_by_accelerate(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is an extra"
    )
    folder = open_run_dir(tmp_path / "run")
    settings = {"ppo": {"seed": 3, "stop": None, "layers": [1, 2]}}
    with Tracker(folder, settings, log_with=("tensorboard",)) as tracker:
        tracker.log(1, {"loss": 1.0}, "sft")
    events = accumulator.EventAccumulator(str(folder / "run")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("sft/loss")] == [(1, 1.0)]


@pytest.mark.parametrize(
    "names, message",
    [("abacus", "unknown tracker 'abacus' .*wandb")]
    + [(name, f"tracker '{name}' is not installed: pip install {name}") for name in ABSENT],
)
def test_a_tracker_that_cannot_be_is_refused_before_the_run(names, message, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        OutputConfig(str(tmp_path / "new"), log_with=names).check()
    assert not (tmp_path / "new").exists()

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_rlhf import checkpoint
from hydra_rlhf.checkpoint import CheckpointError, CheckpointStore, verify
from hydra_rlhf.errors import UserError


def write(text="data"):
    def fill(folder):
        (folder / "actor").mkdir()
        (folder / "actor" / "adapter.safetensors").write_text(text * 100)
        checkpoint.save_state(folder, {"text": text, "rng": checkpoint.rng_state()})

    return fill


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


def names(store):
    return sorted(p.name for p in store.folder.iterdir())


def test_save_then_latest(store):
    assert store.latest() is None
    store.save(3, write("three"))
    store.save(20, write("twenty"))
    store.save(7, write("seven"))
    newest = store.latest()
    assert newest.step == 20 and newest.path.name == "step-00000020"
    assert checkpoint.load_state(newest.path)["text"] == "twenty"
    assert verify(newest.path) == 20


def test_same_step_is_replaced(store):
    store.save(1, write("old"))
    store.save(1, write("new"))
    assert checkpoint.load_state(store.latest().path)["text"] == "new"
    assert names(store) == ["step-00000001"]


def test_total_limit_keeps_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, save_total_limit=2)
    for step in (1, 2, 3, 4):
        store.save(step, write())
    assert names(store) == ["step-00000003", "step-00000004"]
    with pytest.raises(UserError, match="at least 1, got 0"):
        CheckpointStore(tmp_path, save_total_limit=0)


def test_a_limit_never_costs_the_checkpoint_that_was_just_taken(tmp_path):
    """Nor leaves only damaged ones of later steps, before which the run went on."""
    store = CheckpointStore(tmp_path, save_total_limit=3)
    for step in (4, 8, 10):
        store.save(step, write())
    for damaged in ("step-00000008", "step-00000010"):
        truncate(tmp_path / damaged)
    store = CheckpointStore(tmp_path, save_total_limit=2)
    assert store.latest().step == 4
    store.save(6, write())
    assert names(store) == ["step-00000004", "step-00000006"]
    assert store.latest().step == 6


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_save_that_fails_changes_nothing(store, failure):
    store.save(1, write("good"))

    def fail(folder):
        write("half")(folder)
        raise failure

    with pytest.raises(type(failure)):
        store.save(2, fail)
    assert names(store) == ["step-00000001"]
    assert checkpoint.load_state(store.latest().path)["text"] == "good"


def test_disk_full_while_the_manifest_is_written(store, monkeypatch):
    store.save(1, write("good"))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        store.save(2, write())
    assert names(store) == ["step-00000001"]


def truncate(path):
    file = path / "actor" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path):
    file = path / checkpoint.STATE
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def drop(path):
    (path / checkpoint.STATE).unlink()


def add(path):
    (path / "extra.bin").write_text("x")


def no_manifest(path):
    (path / checkpoint.MANIFEST).unlink()


def empty_manifest(path):
    (path / checkpoint.MANIFEST).write_text("")


def foreign_manifest(path):
    (path / checkpoint.MANIFEST).write_text('{"format": 99}')


def link(path):
    file = path / checkpoint.STATE
    target = path.parent / "elsewhere.pt"
    file.rename(target)
    file.symlink_to(target)


DAMAGE = {
    truncate: "adapter.safetensors has 399 bytes and should have 400",
    flip_a_bit: "state.pt has changed",
    drop: "state.pt is missing",
    add: "extra.bin is not in manifest.json",
    no_manifest: "manifest.json is missing",
    empty_manifest: "manifest.json does not read",
    foreign_manifest: "manifest.json is not of format 1",
    link: "state.pt is a link",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damage_is_named_and_the_one_before_is_used(store, damage, caplog):
    store.save(1, write("good"))
    damage(store.save(2, write("data")))
    with caplog.at_level(logging.WARNING):
        newest = store.latest()
    assert newest.step == 1
    (message,) = [r.getMessage() for r in caplog.records]
    assert message.startswith("checkpoint step-00000002 is damaged and passed over: ")
    assert DAMAGE[damage] in message


def test_all_damaged(store):
    for step in (1, 2):
        truncate(store.save(step, write("data")))
    with pytest.raises(UserError, match="all 2 checkpoints in .* are bad"):
        store.latest()


def test_interrupted_saves_are_not_checkpoints_and_are_swept(store):
    store.save(1, write())
    stale = store.folder / ".writing-step-00000002-123"
    stale.mkdir()
    (stale / "half").write_text("x")
    assert store.latest().step == 1
    store.save(3, write())
    assert names(store) == ["step-00000001", "step-00000003"]


def test_everything_is_on_the_disk_before_it_has_its_name(store, monkeypatch):
    """And the name is, before an older checkpoint goes."""
    done = []

    def note(what, function):
        def run(*args, **kwargs):
            path = os.readlink(f"/proc/self/fd/{args[0]}") if what == "sync" else str(args[0])
            done.append((what, path))
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(os, "fsync", note("sync", os.fsync))
    monkeypatch.setattr(os, "rename", note("rename", os.rename))
    store.save_total_limit = 1
    store.save(1, write())
    done.clear()
    store.save(2, write())
    ((_, temporary), (_, forgotten)) = [event for event in done if event[0] == "rename"]
    renamed = done.index(("rename", temporary))
    written = ["actor/adapter.safetensors", checkpoint.STATE, checkpoint.MANIFEST, "actor"]
    assert {p for w, p in done[:renamed]} == {f"{temporary}/{f}" for f in written} | {temporary}
    assert done[renamed - 1] == ("sync", temporary)
    assert done[renamed + 1] == ("sync", str(store.folder))
    assert forgotten.endswith("step-00000001")


@pytest.mark.parametrize(
    "manifest, message",
    [
        ({"step": True, "files": {}}, "no step or no files"),
        ({"step": -1, "files": {}}, "no step or no files"),
        ({"step": 1, "files": []}, "no step or no files"),
        ({"step": 1, "files": {"a": {"sha256": "0"}}}, "no size or no hash for 'a'"),
        ({"step": 1, "files": {"a": {"size": 1}}}, "no size or no hash for 'a'"),
        ({"step": 1, "files": {"a": 1}}, "no size or no hash for 'a'"),
    ],
)
def test_a_manifest_that_says_too_little(manifest, message, tmp_path):
    (tmp_path / checkpoint.MANIFEST).write_text(json.dumps({"format": 1, **manifest}))
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path)


def test_a_checkpoint_under_the_name_of_another_step(store, caplog):
    store.save(1, write()).rename(store.folder / "step-00000009")
    store.save(2, write())
    assert store.latest().step == 2
    assert "step-00000009 is damaged and passed over: manifest.json is of another" in caplog.text


def test_what_only_looks_like_a_checkpoint(store):
    store.save(1, write())
    (store.folder / "step-00000002").write_text("a file")
    (store.folder / "step-00000003-kept").mkdir()
    (store.folder / "my-step-00000004").mkdir()
    assert store.latest().step == 1


def test_a_state_that_is_no_state(tmp_path):
    torch.save([1, 2], tmp_path / checkpoint.STATE)
    with pytest.raises(CheckpointError, match="holds no state"):
        checkpoint.load_state(tmp_path)


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
from hydra_rlhf.checkpoint import CheckpointStore

rng = random.Random(0)
for attempt in range(20):
    folder = Path(sys.argv[1]) / str(attempt)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        store = CheckpointStore(folder, save_total_limit=3)
        for step in range(1, 10000):
            def fill(folder):
                for part in range(4):
                    (folder / f"part-{part}").write_bytes(bytes([step % 256]) * 20000)
                    os.write(writer, f"writing {step}\\n".encode())
            store.save(step, fill)
            os.write(writer, f"saved {step}\\n".encode())
    os.close(writer)
    with os.fdopen(reader) as lines:
        said = [lines.readline() for _ in range(rng.randrange(1, 30))]
        time.sleep(rng.uniform(0.0, 0.01))
        os.kill(child, signal.SIGKILL)
        said += lines.readlines()
    os.waitpid(child, 0)
    print(json.dumps([int(line.split()[1]) for line in said if line.startswith("saved")]))
"""


def test_kill_nine_at_random_moments(tmp_path):
    """20 times: whatever the moment, the newest checkpoint said to be saved is there and whole."""
    out = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(out) == 20
    reports = [json.loads(line) for line in out]
    assert sum(map(bool, reports)) >= 12  # most of the moments come after a first save
    for attempt, done in enumerate(reports):
        newest = CheckpointStore(tmp_path / str(attempt)).latest()
        if done:
            # the one after the last report may have been renamed before it could be said
            assert newest.step in (done[-1], done[-1] + 1)
        if newest is not None:
            parts = [p.read_bytes() for p in newest.path.glob("part-*")]
            assert parts == [bytes([newest.step % 256]) * 20000] * 4


def test_rng_state_round_trip(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.randn(3)

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    draw()  # leaves a cached Gaussian behind in python and numpy
    checkpoint.save_state(tmp_path, {"rng": checkpoint.rng_state()})
    expected = draw()
    draw()
    checkpoint.set_rng_state(checkpoint.load_state(tmp_path)["rng"])
    again = draw()
    assert expected[:3] == again[:3] and torch.equal(expected[3], again[3])


class _Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/hydra-unpickled",))


def test_state_is_never_unpickled(tmp_path):
    torch.save({"evil": _Evil()}, tmp_path / checkpoint.STATE)
    with pytest.raises(CheckpointError, match="state.pt does not load"):
        checkpoint.load_state(tmp_path)
    assert not os.path.exists("/tmp/hydra-unpickled")


@settings(max_examples=200, deadline=None)
@given(
    manifest=st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda x: (
                st.lists(x, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["format", "step", "files", "size", "sha256", "../x"]), x
                )
            ),
            max_leaves=12,
        ).map(lambda x: json.dumps(x).encode()),
    )
)
def test_any_manifest_is_verified_or_refused(manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    (folder / checkpoint.MANIFEST).write_bytes(manifest)
    try:
        verify(folder)
    except CheckpointError:
        pass


def test_signals_ask_once_then_act():
    with checkpoint.stop_on_signal() as request:
        assert not request
        os.kill(os.getpid(), signal.SIGTERM)
        assert request and request.signal is signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_sent_on_is_not_a_second_one(monkeypatch):
    """A scheduler signals every process of a job, and the launcher sends its own on to them."""
    with checkpoint.stop_on_signal() as request:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        assert request.signal is signal.SIGINT
        monkeypatch.setattr(checkpoint, "_SENT_ON", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


@pytest.mark.parametrize("signals", [[], [signal.SIGTERM]])
def test_handlers_are_put_back(signals):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with checkpoint.stop_on_signal():
        assert signal.getsignal(signal.SIGINT) is not before[1]
        for each in signals:
            os.kill(os.getpid(), each)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_the_main_thread_signals_stay_as_they_are():
    def run():
        with checkpoint.stop_on_signal() as request:
            return bool(request)

    with ThreadPoolExecutor() as threads:
        assert threads.submit(run).result() is False

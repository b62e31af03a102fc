"""A run that was stopped goes on as if it had not been, and a bad step does not end it."""

import contextlib
import json
import logging
import math
import os
import random
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from hydra_rlhf import checkpoint, ppo, processes, update
from hydra_rlhf.checkpoint import CheckpointStore
from hydra_rlhf.errors import UserError
from hydra_rlhf.faults import BadUpdates, Shrinking, TrainingFault, overflowed
from tests.rlhf.families import PROMPTS, make_tokenizer
from tests.rlhf.test_ppo import plain_model, settings, word_reward

# Everything that has a state: adaptive KL, running moments, a schedule with warm-up.
STATEFUL = dict(
    max_steps=6,
    save_steps=2,
    kl_controller="adaptive",
    use_score_scaling=True,
    use_score_norm=True,
    warmup_steps=3,
    lr_scheduler_type="cosine",
)


def noisy_reward(prompts, completions, **columns):
    """Draws from python's generator, as users' rewards do."""
    return [score + random.random() for score in word_reward(prompts, completions)]


def run(run_dir, *, model=None, stop_at=None, resume=False, reward_fn=noisy_reward, **changes):
    config = settings(**{**STATEFUL, **changes})

    def on_step(step, metrics):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    return ppo.train(
        config,
        model or plain_model(),
        make_tokenizer(),
        PROMPTS,
        reward_fn=reward_fn,
        on_step=on_step,
        run_dir=run_dir,
        resume=resume,
    )


def figures(result):
    """A step's metrics without the clock and the memory."""
    timed = ("time/", "memory/", "perf/")
    return [{k: v for k, v in m.items() if not k.startswith(timed)} for m in result.metrics]


def trained(result):
    return [*result.models.actor_parameters(), *result.models.critic_parameters()]


@pytest.mark.parametrize("method", ["ppo", "d-lora-ppo", "j-hydra-ppo", "hydra-ppo"])
def test_resumed_run_gives_the_same_numbers(method, tmp_path):
    """Bit for bit on the CPU in float32: metrics of every later step, and every weight."""
    learning_rate = 1e-3 if method == "ppo" else 1e-2
    whole = run(None, method=method, learning_rate=learning_rate)
    first = run(tmp_path, method=method, learning_rate=learning_rate, stop_at=3)
    assert first.stopped_by is signal.SIGTERM and len(first.metrics) == 3
    second = run(tmp_path, method=method, learning_rate=learning_rate, resume=True)
    assert second.first_step == 4
    assert figures(first) + figures(second) == figures(whole)
    for a, b in zip(trained(second), trained(whole), strict=True):
        assert torch.equal(a, b)


def test_the_checkpoint_before_a_damaged_one(tmp_path, caplog):
    whole = run(None)
    run(tmp_path)
    store = CheckpointStore(tmp_path / "checkpoints")
    newest = store.latest()
    assert newest.step == 6
    file = newest.path / "trained.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with caplog.at_level(logging.WARNING):
        again = run(tmp_path, resume=True)
    assert "step-00000006 is damaged" in caplog.text
    assert again.first_step == 5
    assert figures(again) == figures(whole)[4:]


def test_checkpoints_are_adapters_that_peft_loads(tmp_path):
    import peft

    model = plain_model()
    result = run(tmp_path, model=model, save_total_limit=1)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert folder.name == "step-00000006"
    loaded = peft.PeftModel.from_pretrained(plain_model().causal_lm, folder / "actor")
    ids = torch.tensor([[5, 6, 7]])
    expected = result.models.actor.forward_role("actor", ids, torch.ones_like(ids))
    torch.testing.assert_close(loaded(ids).logits, expected)


def test_refuses_another_run(tmp_path):
    run(tmp_path, max_steps=2)
    with pytest.raises(UserError, match="kl_coef was 0.05 and is 0.1"):
        run(tmp_path, max_steps=4, kl_coef=0.1, resume=True)
    with pytest.raises(UserError, match="there were 12 prompts and there are 3"):
        ppo.train(
            settings(**STATEFUL),
            plain_model(),
            make_tokenizer(),
            PROMPTS[:3],
            reward_fn=noisy_reward,
            run_dir=tmp_path,
            resume=True,
        )
    with pytest.raises(UserError, match="step-00000002: it is of another model"):
        run(tmp_path, model=plain_model(num_hidden_layers=3), max_steps=4, resume=True)
    # A whole checkpoint by its manifest, of something that is not this trainer.
    folder = CheckpointStore(tmp_path / "checkpoints").latest().path
    for name in ("trained.safetensors", checkpoint.MANIFEST):
        (folder / name).unlink()
    checkpoint._write_manifest(folder, 2)
    with pytest.raises(UserError, match="cannot resume from .*step-00000002.*trained.safetensors"):
        run(tmp_path, max_steps=4, resume=True)


def test_a_full_disk_costs_a_checkpoint_and_no_more(tmp_path, monkeypatch, caplog):
    write = checkpoint._write_manifest

    def full_at_four(folder, step):
        if step == 4:
            raise OSError(28, "No space left on device")
        write(folder, step)

    monkeypatch.setattr(checkpoint, "_write_manifest", full_at_four)
    with caplog.at_level(logging.WARNING):
        result = run(tmp_path)
    assert len(result.metrics) == 6
    assert "the checkpoint of step 4 was not written" in caplog.text
    found = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert found == ["step-00000002", "step-00000006"]


@contextlib.contextmanager
def no_room_beyond(size):
    """No file can grow beyond ``size`` bytes, whoever writes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Bytes at which PEFT, safetensors and torch stop, the last two without an OSError, and the newest
# file that is then there.
ROOM = {2: (500, None), 3: (25_000, "reward_head.safetensors"), 4: (60_000, "state.pt")}


def test_a_disk_that_refuses_to_write_costs_checkpoints_and_no_more(tmp_path, monkeypatch, caplog):
    save, stopped_at = CheckpointStore.save, {}

    def with_little_room(store, step, write):
        def watched(folder):
            try:
                write(folder)
            finally:
                every = [p for p in folder.rglob("*") if p.is_file()]
                stopped_at[step] = max(every, key=lambda p: p.stat().st_mtime_ns).name

        size, _ = ROOM.get(step, (resource.RLIM_INFINITY, None))
        with no_room_beyond(size):
            return save(store, step, watched)

    monkeypatch.setattr(CheckpointStore, "save", with_little_room)
    with caplog.at_level(logging.WARNING):
        result = run(tmp_path, save_steps=1, max_steps=5)
    assert len(result.metrics) == 5
    for step, (_, name) in ROOM.items():
        assert f"the checkpoint of step {step} was not written ([Errno 27] File too" in caplog.text
        assert name is None or stopped_at[step] == name
    found = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert found == ["step-00000001", "step-00000005"]


def test_a_fault_is_told_where_its_batch_cannot_be_written(tmp_path):
    bad = BadUpdates(1, tmp_path / "faults")
    with no_room_beyond(10), pytest.raises(TrainingFault, match="batch could not be written .*27"):
        bad.is_bad(1, {"loss": torch.tensor(math.nan)}, lambda: {"ids": torch.ones(1000)})


KILLED = """
import os, random, select, signal, sys, time
from hydra_rlhf import checkpoint
from tests.rlhf.test_resume import *
torch.set_num_threads(1)
rng = random.Random(1)
killed = inside = 0
while True:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        save = CheckpointStore.save
        def told(store, step, write):
            os.write(writer, b"<")
            save(store, step, write)
            os.write(writer, b">")
        CheckpointStore.save = told
        result = run(sys.argv[1], resume=True, save_steps=1, max_steps=24)
        result.models.save(sys.argv[1] + "/final")
        os._exit(0)
    os.close(writer)
    if killed < 20:
        if killed % 2:  # inside a save: its beginning is awaited
            os.read(reader, 1)
            time.sleep(rng.uniform(0.0, 0.02))
        else:
            time.sleep(rng.uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
        killed += 1
        said = b""
        while part := os.read(reader, 100):
            said += part
        inside += said.endswith(b"<") or (killed % 2 == 0 and not said)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    if status == 0:
        break
print(killed, inside)
"""


def test_kill_nine_twenty_times(tmp_path):
    """At random moments and inside saves; the final adapters are those of a run left alone."""
    whole = run(None, max_steps=24)
    whole.models.save(tmp_path / "whole")
    out = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr[-2000:]
    killed, inside = map(int, out.stdout.split()[-2:])
    assert killed == 20 and inside >= 5
    for part in ("actor/adapter_model", "critic/adapter_model", "heads/value_head"):
        a = load_file(tmp_path / "whole" / f"{part}.safetensors")
        b = load_file(tmp_path / "killed" / "final" / f"{part}.safetensors")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


class _Poison:
    """Makes the critic's loss NaN in chosen calls of ppo_loss."""

    def __init__(self, monkeypatch, bad):
        self.calls, self.bad = 0, bad
        self.real = update.hydra_kernels.ppo_loss
        monkeypatch.setattr(update.hydra_kernels, "ppo_loss", self)

    def __call__(self, logprobs, values, **kwargs):
        self.calls += 1
        if self.bad(self.calls) and values is not None:
            values = values * torch.nan
        return self.real(logprobs, values, **kwargs)


def test_a_bad_update_is_skipped_and_counted(monkeypatch, caplog):
    # two epochs of two minibatches, each an actor's and a critic's call: 8 calls a step
    _Poison(monkeypatch, lambda call: call == 4)
    with caplog.at_level(logging.WARNING):
        result = run(None, max_steps=2)
    assert [m["policy/bad_updates"] for m in result.metrics] == [1.0, 0.0]
    assert "update skipped, not finite: value_loss" in caplog.text
    assert all(p.isfinite().all() for p in trained(result))
    assert all(v == v for m in result.metrics for v in m.values())  # no NaN in the records


def test_bad_updates_in_a_row_end_the_run_with_the_batch(monkeypatch, tmp_path):
    _Poison(monkeypatch, lambda call: call > 8)
    with pytest.raises(TrainingFault, match="3 updates in a row were not finite .*step 2") as fault:
        run(tmp_path, max_bad_updates=3)
    (file,) = (tmp_path / "faults").iterdir()
    assert str(file) in str(fault.value)
    batch = load_file(file)
    assert batch["query_responses"].shape[0] == 4 and batch["advantages"].shape[1] == 5


def test_out_of_memory_halves_the_microbatch(monkeypatch, caplog):
    """And the gradients, so the run, are those of the small microbatch from the start."""
    real = update.update_minibatch

    def too_large(run, experience, minibatch, total, size, **kwargs):
        found = real(run, experience, minibatch, total, size, **kwargs)  # leaves gradients behind
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    small = run(None, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    monkeypatch.setattr(update, "update_minibatch", too_large)
    with caplog.at_level(logging.WARNING):
        halved = run(None, max_steps=1)
    for message in ("batch_size 4: going on with 2", "batch_size 2: going on with 1"):
        assert message in caplog.text
    for a, b in zip(trained(small), trained(halved), strict=True):
        assert torch.equal(a, b)


def test_bad_updates_in_a_row_are_counted_from_the_last_good_one():
    bad = BadUpdates(limit=2)
    figures = {"loss": torch.tensor(math.nan), "grad_norm": torch.tensor(1.0)}
    for _ in range(3):
        assert bad.is_bad(1, figures, dict)
        assert not bad.is_bad(1, {"loss": torch.tensor(0.5)}, dict)
    assert bad.is_bad(1, figures, dict)
    with pytest.raises(TrainingFault, match=r"not finite \(loss\) at step 1; lower"):
        bad.is_bad(1, figures, dict)  # there is no folder for the batch, and nothing says so


@pytest.fixture
def scaled(monkeypatch):
    """As on a GPU in fp16, where accelerate scales losses: here by powers of 2, which is exact."""
    made = []

    class Scaled(Accelerator):
        first = 2.0**10

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=self.first, growth_interval=5)
            made.append(self.scaler)

        def unscale_gradients(self, optimizer=None):
            self.scaler.unscale_(optimizer)

    monkeypatch.setattr(processes, "Accelerator", Scaled)
    return Scaled, made


def test_a_loss_scale_changes_nothing_and_is_resumed(scaled, tmp_path, monkeypatch):
    result = run(None)
    stopped = run(tmp_path, stop_at=3)
    resumed = run(tmp_path, resume=True)
    whole, _, again = scaled[1]
    assert whole.get_scale() > 2.0**10  # it grew
    assert again.state_dict() == whole.state_dict()
    assert figures(stopped) + figures(resumed) == figures(result)
    monkeypatch.undo()
    plain = run(None)
    assert figures(plain) == figures(result)
    for a, b in zip(trained(plain), trained(resumed), strict=True):
        assert torch.equal(a, b)


def gradients_overflow(monkeypatch, above):
    """The gradient of one factor is inf wherever the loss scale is above a number."""
    real = update.update_minibatch

    def overflowing(run, *args, **kwargs):
        found = real(run, *args, **kwargs)
        if run.accelerator.scaler.get_scale() > above:
            run.state.models.actor_parameters()[0].grad.fill_(math.inf)
        return found

    monkeypatch.setattr(update, "update_minibatch", overflowing)


@pytest.mark.filterwarnings("error:Detected call of .lr_scheduler.step")
def test_a_loss_scale_that_is_too_large_is_no_fault(scaled, monkeypatch):
    """It is halved until updates count, and again where it has grown too far."""
    gradients_overflow(monkeypatch, above=2.0**7)
    result = run(None, max_bad_updates=2)
    bad = [m["policy/bad_updates"] for m in result.metrics]
    assert bad[0] == 3 and 0 < sum(bad[1:]) <= 4
    assert scaled[1][0].get_scale() in (2.0**7, 2.0**8)
    assert all(p.isfinite().all() for p in trained(result))


def test_at_scale_one_an_overflow_is_a_fault(scaled, monkeypatch):
    scaled[0].first = 1.0
    gradients_overflow(monkeypatch, above=0.0)
    with pytest.raises(TrainingFault, match="grad_norm"):
        run(None, max_bad_updates=2)


@pytest.mark.parametrize(("scale", "expected"), [(2.0, True), (1.0, False), (0.5, False)])
def test_a_scale_above_one_is_what_an_overflow_is_blamed_on(scale, expected):
    accelerator = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale))
    norms = {"actor": torch.tensor(1.0), "critic": torch.tensor(math.inf)}
    assert overflowed(accelerator, norms) is expected
    assert not overflowed(accelerator, {"actor": torch.tensor(1.0)})


def test_halves_are_rounded_up(caplog):
    seen = []

    def attempt(size):
        seen.append(size)
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    shrinking = Shrinking("per_device_train_batch_size", 5)
    assert shrinking.run(attempt, clean_up=lambda: None) == "done"
    assert seen == [5, 3, 2] and shrinking.size == 2


def test_out_of_memory_with_one_sequence_is_raised():
    def attempt(size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Shrinking("per_device_train_batch_size", 3).run(attempt, clean_up=lambda: None)


def test_responses_that_end_at_once(monkeypatch):
    """Every response is its stop token alone, so its text is empty: a step still works."""
    monkeypatch.setattr(ppo.rollouts, "stop_token_ids", lambda *args: tuple(range(97)))
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return [1.0] * len(completions)

    result = run(None, max_steps=2, reward_fn=reward)
    assert set(seen) == {""}
    assert [m["objective/response_length"] for m in result.metrics] == [1.0, 1.0]
    assert all(v == v for m in result.metrics for v in m.values())


def test_command_line_resumes(tmp_path):
    """Metrics of the steps after the checkpoint are written once."""
    from hydra_rlhf.records import Tracker, read_metrics

    for resume, steps in ((False, [1, 2, 3]), (True, [3, 4])):
        with Tracker(tmp_path, {"a": 1}, resume=resume) as tracker:
            if not resume:
                tracker.log(1, {"loss": 0.0}, "sft")
            for step in steps:
                tracker.log(step, {"kl": float(step + 10 * resume)}, "ppo")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(m["stage"], m["step"], m.get("kl")) for m in lines] == [
        ("sft", 1, None),
        ("ppo", 1, 1.0),
        ("ppo", 2, 2.0),
        ("ppo", 3, 13.0),
        ("ppo", 4, 14.0),
    ]
    assert len(read_metrics(tmp_path)) == 5

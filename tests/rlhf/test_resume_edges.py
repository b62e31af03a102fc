"""Runs that go on with more steps, fewer, other data, or after something went wrong."""

import json
import random
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hydra_rlhf import checkpoint, ppo, processes, resume, schedule, sft, sft_resume
from hydra_rlhf.checkpoint import CheckpointStore
from hydra_rlhf.commands.inputs import stopped
from hydra_rlhf.errors import UserError
from hydra_rlhf.pairs import encode_pairs
from tests.rlhf import test_resume as of_ppo
from tests.rlhf import test_sft_resume as of_sft
from tests.rlhf.families import PROMPTS, make_tokenizer
from tests.rlhf.test_ppo import plain_model, settings, word_reward


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_more_steps_have_the_rates_of_the_longer_run(scheduler, tmp_path):
    """From the first one on, whose rate the checkpoint has as the end of the shorter run."""
    changes = dict(lr_scheduler=scheduler, eval_every=0)
    of_sft.run(tmp_path / "run", max_steps=4, save_steps=4, **changes)
    of_sft.run(tmp_path / "run", max_steps=8, resume=True, **changes)
    of_sft.run(tmp_path / "whole", max_steps=8, **changes)
    rates = [
        [line["lr"] for line in of_sft.records(tmp_path / name)[4:]] for name in ("run", "whole")
    ]
    assert rates[0] == rates[1] and len(rates[0]) == 4 and min(rates[0]) > 0

    changes = dict(lr_scheduler_type=scheduler, warmup_steps=1, num_ppo_epochs=1)
    changes |= dict(num_mini_batches=1, critic_learning_rate=3e-2, reward_fn=word_reward)
    of_ppo.run(tmp_path / "ppo", max_steps=2, **changes)
    more = of_ppo.run(tmp_path / "ppo", max_steps=4, resume=True, **changes).metrics
    whole = of_ppo.run(None, max_steps=4, **changes).metrics[2:]
    for name in ("lr", "lr/critic"):
        assert [m[name] for m in more] == [m[name] for m in whole]
        assert len(more) == 2 and more[0][name] > more[1][name] > 0


def test_fewer_steps_end_with_an_evaluation_of_what_is_there(tmp_path):
    _, first = of_sft.run(tmp_path, max_steps=4, stop_at=3)  # evaluated after steps 2 and 4
    model, result = of_sft.run(tmp_path, max_steps=3, resume=True)
    assert (result.first_step, result.steps) == (4, 3)
    held_out = encode_pairs(of_sft.Words(), of_sft.pairs(5), max_length=32)
    assert result.final == sft.evaluate(of_sft.CONFIG, model, of_sft.Words(), held_out)
    assert first.final and result.final != first.final


def test_seconds_and_rates_count_what_went_before(tmp_path, monkeypatch):
    clock = {"now": 100.0}

    def tick():
        clock["now"] += 1.0
        return clock["now"]

    monkeypatch.setattr(sft_resume.time, "perf_counter", tick)
    _, first = of_sft.run(tmp_path, stop_at=4)
    clock["now"] += 1000.0
    _, again = of_sft.run(tmp_path, resume=True)
    assert 0 < first.seconds < again.seconds < 500
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert again.tokens / again.seconds <= last["tokens_per_s"] < 2 * again.tokens / again.seconds


def test_a_new_run_does_not_mix_its_checkpoints_with_those_of_another(tmp_path):
    """A later one of the other would be what the next --resume goes on from."""
    of_ppo.run(tmp_path / "ppo", max_steps=1, save_steps=1)
    with pytest.raises(UserError, match="ppo/checkpoints holds checkpoints of a run: resume it"):
        of_ppo.run(tmp_path / "ppo", max_steps=1)
    of_sft.run(tmp_path / "sft", max_steps=1, save_steps=1)
    (tmp_path / "sft" / "run.json").unlink()  # as through Python, where no folder was opened
    (tmp_path / "sft" / "checkpoints").rename(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="checkpoints holds checkpoints of a run: resume it"):
        of_sft.sft.train(
            of_sft.CONFIG,
            of_sft.tiny_model(),
            of_sft.Words(),
            of_sft.pairs(9),
            of_sft.Tracker(None),
            run_dir=tmp_path,
        )


def test_prompts_are_those_that_they_were(tmp_path):
    def go_on(prompts):
        return ppo.train(
            settings(**{**of_ppo.STATEFUL, "max_steps": 2}),
            plain_model(),
            make_tokenizer(),
            prompts,
            reward_fn=word_reward,
            run_dir=tmp_path,
            resume=True,
        )

    of_ppo.run(tmp_path, max_steps=1, save_steps=1)
    with pytest.raises(UserError, match="the prompts are not what they were"):
        go_on([*PROMPTS[:-1], "w5 w6"])
    with pytest.raises(UserError, match="the prompts are not what they were"):
        go_on([PROMPTS[1], PROMPTS[0], *PROMPTS[2:]])
    assert go_on([SimpleNamespace(prompt=text, extra={}) for text in PROMPTS]).first_step == 2


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_stop_that_could_not_be_saved_is_told_so(stage, tmp_path, monkeypatch):
    def full(folder, step):
        if step == 3:
            raise OSError(28, "No space left on device")
        real(folder, step)

    real = checkpoint._write_manifest
    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    runs = {"sft": of_sft.run, "ppo": of_ppo.run}
    found = runs[stage](tmp_path / "full", stop_at=3, save_steps=2)
    result = found[1] if stage == "sft" else found
    assert result.stopped_by is signal.SIGTERM and not result.saved
    assert "not saved; --resume goes on from the checkpoint before" in stopped(
        result.stopped_by, result.saved
    )
    monkeypatch.setattr(checkpoint, "_write_manifest", real)
    found = runs[stage](tmp_path / "free", stop_at=3)
    result = found[1] if stage == "sft" else found
    assert result.saved
    assert stopped(result.stopped_by, True) == (
        "SIGTERM: saved; the same command with --resume goes on"
    )


def test_the_scale_of_fp16_losses_goes_on(tmp_path):
    """In SFT as in PPO; accelerate has one on GPUs only."""

    def run(resume, steps):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        of_sft.sft.train(
            replace(of_sft.CONFIG, max_steps=steps, save_steps=1, eval_every=0),
            of_sft.tiny_model(),
            of_sft.Words(),
            of_sft.pairs(9),
            of_sft.Tracker(None),
            accelerator=accelerator,
            run_dir=tmp_path,
            resume=resume,
        )
        return accelerator.scaler.state_dict()

    first = run(False, 3)
    assert first["scale"] == 2.0**11 and first["_growth_tracker"] == 1
    assert run(True, 3) == first
    assert run(True, 4)["scale"] == 2.0**12


def test_another_precision_is_refused(tmp_path, monkeypatch):
    of_sft.run(tmp_path, max_steps=1, save_steps=1)
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "bf16"))
    with pytest.raises(UserError, match="mixed_precision was 'no' and is 'bf16'"):
        of_sft.run(tmp_path, max_steps=2, resume=True)


def test_generators_go_back_to_the_process_they_were_of(caplog):
    states = []
    for seed in (1, 2):
        schedule.seed_everything(seed)
        states.append(checkpoint.rng_state())
        expected = random.random(), np.random.rand(), float(torch.rand(()))
    resume.put_back_rng(SimpleNamespace(index=1), states)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    assert not caplog.records
    resume.put_back_rng(SimpleNamespace(index=2), states)
    assert "process 2 was not there before" in caplog.text


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_signal_to_another_process_stops_this_one_too(stage, tmp_path, monkeypatch):
    flags = []
    monkeypatch.setattr(
        processes.Processes, "any", lambda self, flag: flags.append(flag) or len(flags) == 2
    )
    found = {"sft": of_sft.run, "ppo": of_ppo.run}[stage](tmp_path)
    result = found[1] if stage == "sft" else found
    assert flags == [False, False] and result.stopped_by is signal.SIGTERM and result.saved
    assert CheckpointStore(tmp_path / "checkpoints").latest().step == 2


@pytest.mark.parametrize(("asked", "expected"), [([0, 1], True), ([1, 0], True), ([0, 0], False)])
def test_what_is_true_of_any_process_is_true_of_all(asked, expected):
    for flag in asked:
        told = SimpleNamespace(count=2, device="cpu", sum=lambda own: own * 0 + sum(asked))
        assert processes.Processes.any(told, bool(flag)) is expected

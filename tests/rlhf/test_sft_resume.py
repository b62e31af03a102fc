"""An SFT run that was stopped goes on as if it had not been: metrics and weights, bit for bit."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hydra_rlhf import checkpoint, cli, raft, sft, sft_resume
from hydra_rlhf.checkpoint import CheckpointStore
from hydra_rlhf.commands.sft import add_lora
from hydra_rlhf.errors import UserError
from hydra_rlhf.pairs import EncodedPair
from hydra_rlhf.records import Tracker, open_run_dir
from hydra_rlhf.sft_config import SFTConfig
from tests.rlhf.test_raft import model_with_adapter
from tests.rlhf.test_sft import Words, pairs, tiny_model, weights
from tests.rlhf.two_processes import prepare_sft

# Three steps an epoch, the last of them of one pair; a schedule that moves at every step.
CONFIG = SFTConfig(
    batch_size=4, epochs=2, learning_rate=1e-2, warmup_ratio=0.4, eval_every=2, weight_decay=0.1
)
STEPS = 6
LORA = dict(lora_r=4, lora_dropout=0.2)
KINDS = {
    "hydra": {},
    "hydra-lora": LORA,
    "sft": dict(objective="sft", micro_batch_size=3),
    "sft-packed": dict(objective="sft", packing=True, **LORA),
    "rm": dict(objective="rm", head_learning_rate=2e-2),
    "dpo": dict(objective="dpo", **LORA),
}


def run(run_dir, *, stop_at=None, resume=False, number=signal.SIGTERM, count=9, **changes):
    """A run in its folder; the model it trained, and its result."""
    config = replace(CONFIG, **changes)
    model = tiny_model()
    if config.lora_r:
        model = add_lora(model, config)

    def on_step(step):
        if step == stop_at:
            os.kill(os.getpid(), number)

    with Tracker(open_run_dir(run_dir, resume=resume), resume=resume) as tracker:
        result = sft.train(
            config,
            model,
            Words(),
            pairs(count),
            tracker,
            eval_pairs=pairs(5),
            on_step=on_step,
            run_dir=run_dir,
            resume=resume,
        )
    return model, result


def records(run_dir):
    """metrics.jsonl without the clock."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in m.items() if k not in ("time", "tokens_per_s")} for m in lines]


def assert_same(folder, found, expected):
    """Of two runs, in ``folder/whole`` and ``folder/run``."""
    assert torch.equal(weights(found[0]), weights(expected[0]))
    assert found[1].final == expected[1].final and found[1].final
    assert (found[1].steps, found[1].tokens) == (expected[1].steps, expected[1].tokens)
    assert len(records(folder / "run")) == STEPS
    assert records(folder / "run") == records(folder / "whole")


@pytest.mark.parametrize("stop_at", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_gives_the_same_numbers(kind, stop_at, tmp_path):
    """Stopped within an epoch, and between two."""
    whole = run(tmp_path / "whole", **KINDS[kind])
    _, first = run(tmp_path / "run", stop_at=stop_at, **KINDS[kind])
    assert first.stopped_by is signal.SIGTERM and first.steps == stop_at
    assert len(records(tmp_path / "run")) == stop_at
    torch.rand(3)  # as other work between the two does
    again = run(tmp_path / "run", resume=True, **KINDS[kind])
    assert again[1].first_step == stop_at + 1 and again[1].stopped_by is None
    assert_same(tmp_path, again, whole)


def test_a_run_that_was_stopped_at_its_end_has_its_last_evaluation(tmp_path):
    whole = run(tmp_path / "whole")
    run(tmp_path / "run", stop_at=STEPS, number=signal.SIGINT)
    assert_same(tmp_path, run(tmp_path / "run", resume=True), whole)


KILLED = """
import os, signal, sys
from pathlib import Path
from hydra_rlhf import checkpoint
from tests.rlhf.test_sft_resume import *
torch.set_num_threads(1)
manifest = checkpoint._write_manifest

def killed_inside_a_save(at, step):
    manifest(at, step)
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

def in_a_child(**how):
    child = os.fork()
    if child == 0:
        run(Path(sys.argv[1]) / kind, save_steps=2, **KINDS[kind], **how)
        os._exit(0)
    return os.waitpid(child, 0)[1]

for kind in ("hydra", "hydra-lora"):
    checkpoint._write_manifest = manifest
    assert in_a_child(stop_at=3, number=signal.SIGKILL) == signal.SIGKILL
    checkpoint._write_manifest = killed_inside_a_save
    assert in_a_child(resume=True) == signal.SIGKILL
"""


def test_kill_nine_between_saves_and_inside_one(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr[-2000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the runs that were killed
    try:
        for kind in ("hydra", "hydra-lora"):
            (tmp_path / kind).rename(tmp_path / "run")
            left = {p.name[:8] for p in (tmp_path / "run" / "checkpoints").iterdir()}
            assert left == {"step-000", ".writing"}
            whole = run(tmp_path / "whole", **KINDS[kind])
            again = run(tmp_path / "run", resume=True, save_steps=2, **KINDS[kind])
            assert again[1].first_step == 3
            assert_same(tmp_path, again, whole)
            for name in ("run", "whole"):
                (tmp_path / name).rename(tmp_path / f"{kind}-{name}")
    finally:
        torch.set_num_threads(threads)


def test_the_checkpoint_before_a_damaged_one(tmp_path, caplog):
    whole = run(tmp_path / "whole")
    run(tmp_path / "run", save_steps=2, save_total_limit=2, stop_at=5)
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [p.name for p in folders] == ["step-00000004", "step-00000005"]
    file = folders[-1] / "trained.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with caplog.at_level(logging.WARNING):
        again = run(tmp_path / "run", resume=True)
    assert "step-00000005 is damaged and passed over: trained.safetensors has" in caplog.text
    assert again[1].first_step == 5
    assert_same(tmp_path, again, whole)


def test_a_checkpoint_of_lora_is_an_adapter_that_peft_loads(tmp_path):
    import peft

    trained, _ = run(tmp_path / "run", save_steps=STEPS, **LORA)
    folder = tmp_path / "run" / "checkpoints" / "step-00000006"
    loaded = peft.PeftModel.from_pretrained(tiny_model().causal_lm, folder / "actor").eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = trained.eval().forward_role("actor", ids, torch.ones_like(ids))
    torch.testing.assert_close(loaded(ids).logits, expected)


def test_what_may_change_and_what_may_not(tmp_path, monkeypatch):
    folder, small = tmp_path / "run", tiny_model
    run(folder, save_steps=2, max_steps=2)
    for changes, message in (
        (dict(learning_rate=2e-2), "learning_rate was 0.01 and is 0.02"),
        (dict(seed=1), "seed was 0 and is 1"),
        (dict(packing=True), "packing was False and is True"),
        (dict(count=10), "there were 9 examples and there are 10"),
        (dict(max_length=9), "max_length was None and is 9"),
        (LORA, "lora_dropout was 0.0 and is 0.2"),
    ):
        with pytest.raises(UserError, match=f"step-00000002: {message}"):
            run(folder, resume=True, max_steps=2, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(Words, "eos_token_id", 3)
        with pytest.raises(
            UserError, match="the examples, or their tokens, are not what they were"
        ):
            run(folder, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "tiny_model", lambda: small().bfloat16())
        with pytest.raises(UserError, match="it is of another model"):
            run(folder, resume=True)
    assert len(records(folder)) == 2  # nothing of them is in the records
    _, result = run(folder, resume=True, max_steps=4, save_steps=1, micro_batch_size=2)
    assert (result.first_step, result.steps, len(records(folder))) == (3, 4, 4)


class _Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_pickle_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "run", save_steps=2, max_steps=2)
    folder = CheckpointStore(tmp_path / "run" / "checkpoints").latest().path
    torch.save({"step": _Harm()}, folder / checkpoint.STATE, pickle_module=pickle)
    (folder / checkpoint.MANIFEST).unlink()
    checkpoint._write_manifest(folder, 2)
    with pytest.raises(UserError, match="cannot resume from .*state.pt does not load"):
        run(tmp_path / "run", resume=True)
    assert not (tmp_path / "harm").exists()


def test_raft_goes_on_with_its_prompts_and_its_answers(tmp_path, monkeypatch):
    """Which it samples: the generator and the order of the prompts go on too."""
    config = SFTConfig(
        objective="raft", num_samples=3, response_length=4, lora_r=4, batch_size=2, max_steps=4
    )
    prompts = ["3 4", "5 6", "7", "8 9 10", "11"]
    step, calls = sft.Trainer.step, []

    def stopped_in_the_second(trainer, batch):
        calls.append(batch)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, batch)

    monkeypatch.setattr(sft.Trainer, "step", stopped_in_the_second)

    def run_raft(name, resume=False):
        model = model_with_adapter(config)
        into = dict(run_dir=tmp_path / name, resume=resume)
        with Tracker(open_run_dir(tmp_path / name, resume=resume), resume=resume) as tracker:
            result = raft.train(config, model, Words(), prompts, tracker, **into)
        return weights(model), result

    whole, _ = run_raft("whole")
    _, first = run_raft("run")
    assert (first.steps, first.stopped_by) == (2, signal.SIGTERM)
    again, second = run_raft("run", resume=True)
    assert (second.first_step, second.steps) == (3, 4)
    assert calls[:4] == calls[4:]
    assert torch.equal(again, whole)
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_the_digest_sees_every_token_and_its_place():
    one = EncodedPair([5, 6], [7, 8], [9], 0.5)
    others = [
        replace(one, prompt=[5], chosen=[6, 7, 8]),
        replace(one, chosen=[7], rejected=[8, 9]),
        replace(one, rejected=[10]),
        replace(one, margin=None),
    ]
    found = {sft_resume.digest([each]) for each in (one, *others)}
    assert len(found) == 5 and sft_resume.digest([one]) in found
    assert sft_resume.digest([one, others[0]]) != sft_resume.digest([others[0], one])


def test_weights_that_are_split_have_no_checkpoints_and_that_is_said(monkeypatch):
    monkeypatch.setattr(sft_resume.sharding, "is_asked_for", lambda accelerator: True)
    for config, resume in ((SFTConfig(save_steps=1), False), (SFTConfig(), True)):
        with pytest.raises(UserError, match="no checkpoints of weights that FSDP splits"):
            sft_resume.refuse_split_weights(config, SimpleNamespace(), resume)
    sft_resume.refuse_split_weights(SFTConfig(save_steps=1, lora_r=4), SimpleNamespace(), True)
    sft_resume.refuse_split_weights(SFTConfig(), SimpleNamespace(), False)


@pytest.mark.parametrize("lora", [[], ["--lora-r", "4"]], ids=["full", "lora"])
def test_the_command_stops_and_goes_on(lora, tmp_path, monkeypatch, capsys):
    """Ends with 128 + the signal; the model of the resumed run is that of one left alone."""
    prepare_sft(tmp_path)

    def command(name, *flags):
        argv = ["sft", "--model", tmp_path / "start", "--pair-data", tmp_path / "pairs.jsonl"]
        argv += ["--output-dir", tmp_path / name, "--batch-size", "3", "--epochs", "2", *flags]
        argv += ["--eval-share", "0.25", "--learning-rate", "1e-2", "--device", "cpu", *lora]
        return cli.main([str(a) for a in argv])

    step, calls = sft.Trainer.step, []

    def stopped_in_the_fifth(trainer, batch):
        calls.append(batch)
        if len(calls) == 6 + 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, batch)

    monkeypatch.setattr(sft.Trainer, "step", stopped_in_the_fifth)
    assert command("whole") == 0
    with pytest.raises(SystemExit) as stop:
        command("run", "--save-steps", "4")
    assert stop.value.code == 128 + signal.SIGTERM
    assert "saved; the same command with --resume goes on" in capsys.readouterr().out
    assert not (tmp_path / "run" / "model").exists()
    assert command("run") == 2 and "already holds a run" in capsys.readouterr().err
    assert command("run", "--resume") == 0
    assert len(calls) == 6 + 5 + 1
    every = (p for p in (tmp_path / "whole/model").rglob("*") if p.is_file())
    files = [p.relative_to(tmp_path / "whole") for p in every]
    assert any(p.suffix == ".safetensors" for p in files)
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "run" / file).read_bytes()
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert command("new", "--resume") == 2 and "holds no run" in capsys.readouterr().err
    assert command("new", "--save-steps", "-1") == 2
    assert "save_steps must be 0 or more, got -1" in capsys.readouterr().err

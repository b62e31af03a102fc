"""An update of SFT that is not finite is skipped, counted and, in a row, ends the run."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hydra_rlhf import processes, raft, sft
from hydra_rlhf.errors import UserError
from hydra_rlhf.faults import TrainingFault
from hydra_rlhf.pair_loss import PairLoss
from hydra_rlhf.pairs import encode_pairs
from hydra_rlhf.records import Tracker, open_run_dir
from hydra_rlhf.sft_config import SFTConfig
from tests.rlhf.test_raft import model_with_adapter
from tests.rlhf.test_sft import Words, pairs, tiny_model, weights

pytestmark = pytest.mark.filterwarnings("error:Detected call of .lr_scheduler.step")
CONFIG = SFTConfig(batch_size=4, epochs=3, learning_rate=1e-2, weight_decay=0.1)  # 6 steps


def run(run_dir=None, *, on_step=None, **changes):
    """The model that a run of 8 pairs trained, and its lines of metrics.jsonl."""
    model = tiny_model()
    with Tracker(None if run_dir is None else open_run_dir(run_dir)) as tracker:
        sft.train(
            replace(CONFIG, **changes),
            model,
            Words(),
            pairs(8),
            tracker,
            run_dir=run_dir,
            on_step=on_step and (lambda step: on_step(step, model)),
        )
    if run_dir is None:
        return model, []
    return model, [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of some passes NaN."""
    real, calls = PairLoss.forward, []

    def on(bad):
        def forward(self, batch):
            calls.append(batch)
            sums = real(self, batch)
            return {n: v * math.nan for n, v in sums.items()} if bad(len(calls)) else sums

        monkeypatch.setattr(PairLoss, "forward", forward)
        return calls

    return on


def test_a_bad_update_is_skipped_and_counted(poison, tmp_path, caplog):
    poison(lambda call: call == 3)
    after = {}
    with caplog.at_level(logging.WARNING):
        _, lines = run(tmp_path, on_step=lambda step, model: after.update({step: weights(model)}))
    assert [line["bad_updates"] for line in lines] == [0, 0, 1, 0, 0, 0]
    assert "step 3: update skipped, not finite: loss, grad_norm (1 in a row, 5 end" in caplog.text
    assert torch.equal(after[2], after[3])  # nor did weight decay or momentum move them
    assert not torch.equal(after[3], after[4]) and after[6].isfinite().all()
    assert [line["loss"] is None for line in lines] == [False, False, True, False, False, False]
    whole = [line["lr"] for line in lines]
    assert whole == sorted(whole, reverse=True) and whole[2] > whole[3]  # the schedule goes on


def test_bad_updates_in_a_row_end_the_run_with_the_batch(poison, tmp_path):
    batches = poison(lambda call: call > 1)
    with pytest.raises(TrainingFault, match="2 updates in a row were not finite .*step 3") as fault:
        run(tmp_path, max_bad_updates=2)
    (file,) = (tmp_path / "faults").iterdir()
    assert str(file) in str(fault.value) and file.name == "step-00000003.safetensors"
    assert torch.equal(load_file(file)["input_ids"], batches[-1].input_ids)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_alone_may_be_at_fault(max_grad_norm, caplog):
    """Whether gradients are clipped or not; nothing is written where there is no folder."""
    model = tiny_model()
    model.reward_head.weight.requires_grad_(True)
    model.reward_head.weight.register_hook(lambda gradient: gradient * math.inf)
    config = replace(CONFIG, max_grad_norm=max_grad_norm, max_bad_updates=3)
    before = weights(model)
    with caplog.at_level(logging.WARNING):
        with pytest.raises(TrainingFault, match=r"not finite \(grad_norm\) at step 3; lower"):
            sft.train(config, model, Words(), pairs(8), Tracker(None))
    assert caplog.text.count("not finite: grad_norm (") == 3
    assert torch.equal(weights(model), before)


def test_raft_has_the_same_guard(poison, tmp_path):
    poison(lambda call: True)
    model = model_with_adapter()
    config = SFTConfig(
        objective="raft", lora_r=4, batch_size=2, max_steps=4, num_samples=2, max_bad_updates=2
    )
    with pytest.raises(TrainingFault, match="2 updates in a row .*step 2, the batch is in"):
        raft.train(
            replace(config, response_length=4),
            model,
            Words(),
            ["5 6", "7 8", "9"],
            Tracker(None),
            run_dir=tmp_path,
        )


def test_how_many_end_a_run_is_checked():
    with pytest.raises(UserError, match="max_bad_updates must be above 0"):
        SFTConfig(max_bad_updates=0)


@pytest.fixture
def scaled(monkeypatch):
    """As on a GPU in fp16, where accelerate scales losses: here by powers of 2, which is exact."""

    class Scaled(processes.Accelerator):
        first = 2.0**10

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=self.first, growth_interval=5)

        def unscale_gradients(self, optimizer=None):
            for one in self._optimizers:
                self.scaler.unscale_(one.optimizer)

    monkeypatch.setattr(processes, "Accelerator", Scaled)
    return Scaled


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_loss_scale_changes_nothing(scaled, monkeypatch, max_grad_norm):
    found, _ = run(max_grad_norm=max_grad_norm)
    monkeypatch.undo()
    expected, _ = run(max_grad_norm=max_grad_norm)
    assert torch.equal(weights(found), weights(expected))


def test_a_loss_scale_that_is_too_large_is_no_fault(scaled, tmp_path):
    """It is halved until updates count; at 1 there is nothing left to blame it on."""

    def overflow(model, accelerator, above):
        model.reward_head.weight.requires_grad_(True)
        model.reward_head.weight.register_hook(
            lambda gradient: gradient * (math.inf if accelerator.scaler.get_scale() > above else 1)
        )

    def train(above, **changes):
        model, accelerator = tiny_model(), processes.make_accelerator()
        overflow(model, accelerator, above)
        trainer = sft.Trainer(replace(CONFIG, **changes), model, Words(), accelerator, 6)
        batch = encode_pairs(Words(), pairs(4), max_length=32)
        return [trainer.step(batch)[0]["bad_updates"] for _ in range(5)], accelerator

    bad, accelerator = train(2.0**7, max_bad_updates=2)
    assert bad == [1, 1, 1, 0, 0] and accelerator.scaler.get_scale() == 2.0**7
    scaled.first = 1.0
    with pytest.raises(TrainingFault, match="grad_norm"):
        train(0.0, max_bad_updates=2)

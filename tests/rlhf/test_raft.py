"""RAFT imitates the best of its own answers, and so moves the policy and nothing else."""

from dataclasses import replace

import pytest
import torch

from hydra_rlhf import raft
from hydra_rlhf import rollout as rollouts
from hydra_rlhf.commands.sft import add_lora
from hydra_rlhf.errors import UserError
from hydra_rlhf.model import HydraModel
from hydra_rlhf.records import Tracker, open_run_dir, read_metrics
from hydra_rlhf.sft_config import SFTConfig
from tests.rlhf.test_sft import Words, tiny_model

CONFIG = SFTConfig(
    objective="raft",
    num_samples=8,
    response_length=4,
    lora_r=8,
    batch_size=16,
    max_steps=30,
    learning_rate=1e-2,
    lr_scheduler="constant",
)


@torch.no_grad()
def plain_model():
    """A final norm and a small head would keep the policy near uniform whatever an adapter does."""
    model = tiny_model()
    model.causal_lm.lm_head.weight.mul_(20.0)
    return model


def model_with_adapter(config=CONFIG):
    return add_lora(plain_model(), config)


def low_tokens(model, rollout):
    """How many tokens of each response are below 12, of a vocabulary of 31."""
    return torch.tensor([sum(t < 12 for t in ids) for ids in raft.response_ids(rollout)]).float()


def test_the_reward_of_its_answers_rises_and_the_base_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(raft, "score", low_tokens)
    model = model_with_adapter()
    base = {k: v.clone() for k, v in plain_model().causal_lm.state_dict().items()}
    prompts = [f"{a} {b}" for a in range(3, 7) for b in range(8, 12)]
    with Tracker(open_run_dir(tmp_path / "run")) as tracker:
        result = raft.train(CONFIG, model, Words(), prompts, tracker)
    rewards = [line["objective/scores"] for line in read_metrics(tmp_path / "run")]
    best = [line["objective/best"] for line in read_metrics(tmp_path / "run")]
    assert result.steps == len(rewards) == 30
    assert all(b >= r for b, r in zip(best, rewards, strict=True))
    # Of four tokens about 1.5 are low at first; a batch mean of 128 wanders by 0.1.
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1.0
    for name, value in model.causal_lm.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer.", ".")]), name


def test_packed_answers_train_alike_and_the_model_is_asked_first(monkeypatch):
    asked, after = [], []
    monkeypatch.setattr(raft.packing, "check", lambda model, longest: asked.append(longest))
    for packed in (False, True):
        config = replace(CONFIG, packing=packed, max_steps=2, learning_rate=1e-3)
        model = model_with_adapter(config)
        raft.train(config, model, Words(), ["3 8", "4 9 5", "7"], Tracker(None))
        after.append(torch.cat([p.flatten() for p in model.adapter_parameters("actor")]))
    torch.testing.assert_close(after[1], after[0], rtol=0, atol=1e-5)
    assert asked == [3 + CONFIG.response_length]


@torch.no_grad()
def test_scores_are_the_reward_heads_with_the_adapter_off():
    model = model_with_adapter()
    for parameter in model.adapter_parameters("actor"):
        parameter.normal_(std=0.5)
    ids, mask = rollouts.pad_left([[3, 4, 5], [6, 7]], 0)
    sampling = rollouts.Sampling(3, 1.0, (2,), 0)
    rollout = rollouts.generate(model, ids, mask, sampling)
    plain = plain_model().eval()
    found = raft.score(model, rollout)
    for row, (prompt, response) in enumerate(
        zip(([3, 4, 5], [6, 7]), raft.response_ids(rollout), strict=True)
    ):
        alone = torch.tensor([prompt + response])
        expected = plain.forward_role("reward", alone, torch.ones_like(alone))[0, -1]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


def test_the_imitated_answer_is_the_best_of_each_prompt(monkeypatch):
    """Scores are set here: of four answers a prompt the second, then the last, is the best."""
    seen = []
    model = model_with_adapter()
    wanted = torch.tensor([0.0, 3.0, 1.0, 2.0] + [0.0, 1.0, 2.0, 5.0])
    kept = {}

    def score(model, rollout):
        kept["answers"] = raft.response_ids(rollout)
        return wanted

    monkeypatch.setattr(raft, "score", score)
    original = raft.sft.Trainer.step
    monkeypatch.setattr(
        raft.sft.Trainer, "step", lambda self, batch: seen.append(batch) or original(self, batch)
    )
    config = SFTConfig(objective="raft", lora_r=4, batch_size=2, max_steps=1, num_samples=4)
    raft.train(config, model, Words(), ["3 4", "5 6"], Tracker(None))
    assert [pair.chosen for pair in seen[0]] == [kept["answers"][1], kept["answers"][7]]


def test_it_needs_an_adapter_a_reward_head_and_prompts():
    config = SFTConfig(objective="raft", lora_r=4, max_steps=1)
    with pytest.raises(UserError, match="lora_r"):
        raft.train(config, tiny_model(), Words(), ["3"], Tracker(None))
    with pytest.raises(UserError, match="no prompts"):
        raft.train(config, model_with_adapter(), Words(), [], Tracker(None))
    headless = add_lora(HydraModel(tiny_model().causal_lm), config)
    with pytest.raises(UserError, match="reward head"):
        raft.train(config, headless, Words(), ["3"], Tracker(None))


def test_answers_are_drawn_by_seed_and_step_alone(monkeypatch):
    """Processes whose dropout drew more or less go on with the same answers."""
    original, calls = raft.sft.Trainer.step, []
    config = replace(CONFIG, max_steps=3, batch_size=2)

    def answers(draws, **changes):
        def step(trainer, batch):
            calls[-1].append(batch)
            torch.rand(draws)
            return original(trainer, batch)

        calls.append([])
        monkeypatch.setattr(raft.sft.Trainer, "step", step)
        model = model_with_adapter()
        raft.train(replace(config, **changes), model, Words(), ["3 4", "5 6", "7"], Tracker(None))
        assert not any(module.training for module in model.modules())
        return calls[-1]

    first = answers(0)
    assert answers(5) == first != answers(0, seed=1)
    assert first[0] != first[1] != first[2]

"""Steps of SFT against plain PyTorch: one sequence at a time, logits held, torch's AdamW.

Only the order of the pairs is taken from the run. Settings are away from their defaults.
"""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from hydra_rlhf import packing, sft
from hydra_rlhf.commands.sft import add_lora
from hydra_rlhf.data import Demonstration, Preference
from hydra_rlhf.pairs import encode_pairs
from hydra_rlhf.records import Tracker
from hydra_rlhf.sft_config import SFTConfig
from tests.rlhf.families import make_model
from tests.rlhf.test_sft import Words, pairs, tiny_model

COMMON = dict(
    batch_size=4,
    micro_batch_size=3,
    epochs=1.75,
    learning_rate=1e-2,
    weight_decay=0.2,
    warmup_ratio=0.5,
    max_grad_norm=0.4,
    eval_every=2,
    eval_batch_size=2,
    seed=5,
)
CASES = {
    "hydra": dict(gamma=0.4, center_rewards=0.05, head_learning_rate=3e-2),
    "rm": dict(gamma=0.4, use_margins=False, lr_scheduler="linear"),
    "sft": dict(lr_scheduler="constant", max_grad_norm=0.0),
    "dpo": dict(beta=0.3, lora_r=2),
    "pro": dict(beta=0.3, lora_r=2, lr_scheduler="linear"),
    "rrhf": dict(lora_r=2),
}


class Plain:
    def __init__(self, config, model, steps):
        self.config, self.model, self.steps, self.done = config, model, steps, 0
        self.role = "actor" if config.lora_r else "reference"
        body = [p for n, p in model.base.named_parameters() if "lora_" in n or not config.lora_r]
        for parameter in body:
            parameter.requires_grad_(True)
        matrices = [p for p in body if p.dim() > 1]
        rest = [p for p in body if p.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        if config.objective in ("hydra", "rm"):
            head = model.reward_head.weight.requires_grad_(True)
            rate = config.head_learning_rate or config.learning_rate
            groups.append({"params": [head], "lr": rate, "weight_decay": config.weight_decay})
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.trained = [p for group in groups for p in group["params"]]

    def logprobs(self, prompt, response, role):
        ids = torch.tensor([prompt + response])
        every = self.model.forward_role(role, ids, torch.ones_like(ids))[0].log_softmax(-1)
        first = max(len(prompt), 1)  # the first token of an empty prompt is not predicted
        return torch.stack([every[t - 1, ids[0, t]] for t in range(first, ids.shape[1])])

    def reward(self, prompt, response):
        ids = torch.tensor([prompt + response])
        hidden = self.model.hidden(ids, torch.ones_like(ids), role=self.role)
        return (hidden[0, -1].float() * self.model.reward_head.weight[0]).sum()

    def losses(self, examples):
        """Means of a batch: the objective, and what is reported beside it."""
        config, found = self.config, {}
        both = [one for one in examples if one.rejected]
        text = [-self.logprobs(one.prompt, one.chosen, self.role) for one in examples]
        cross_entropy = torch.cat(text).mean()
        total = torch.zeros(())
        if config.objective in ("hydra", "rm"):
            won = torch.stack([self.reward(one.prompt, one.chosen) for one in both])
            lost = torch.stack([self.reward(one.prompt, one.rejected) for one in both])
            margin = torch.tensor([one.margin or 0.0 for one in both])
            ranking = -logsigmoid(won - lost - margin * config.use_margins).mean()
            center = config.center_rewards * ((won + lost) ** 2).mean()
            total = total + (ranking + center) * (config.gamma if config.objective != "rm" else 1)
            found["rm_loss"] = ranking
        elif config.objective != "sft":
            won, lost = [], []
            for side, into in (("chosen", won), ("rejected", lost)):
                for one in both:
                    new = self.logprobs(one.prompt, getattr(one, side), "actor")
                    if config.objective == "dpo":
                        old = self.logprobs(one.prompt, getattr(one, side), "reference")
                        into.append((new - old.detach()).sum())
                    else:
                        into.append(new.mean())
            won, lost = torch.stack(won), torch.stack(lost)
            found["rank_loss"] = {
                "dpo": -logsigmoid(config.beta * (won - lost)),
                "pro": -(won.exp() / (won.exp() + lost.exp())).log(),
                "rrhf": (lost - won).clip(min=0),
            }[config.objective].mean()
            total = total + found["rank_loss"]
        if config.objective != "rm":
            weight = {"dpo": 0.0, "pro": config.beta}.get(config.objective, 1.0)
            total = total + weight * cross_entropy
            found["sft_loss"] = cross_entropy
        if config.objective != "sft":
            tied = torch.tensor([one.chosen == one.rejected for one in both]) | (won == lost)
            right = (won > lost) & ~tied
            found["accuracy"] = (right.float() + tied.float() / 2).mean()
            found["reward_margin"] = (won - lost).mean()
            if config.objective in ("hydra", "rm"):
                stated = (won - lost).abs().sigmoid()
                bins = (stated * 20 - 10).long().clip(max=9)
                parts = [(stated[bins == b], right[bins == b].float()) for b in range(10)]
                error = sum(len(s) * abs(s.mean() - r.mean()) for s, r in parts if len(s))
                found["calibration"] = error / len(both)
        return found | {"loss": total}

    def step(self, examples):
        config = self.config
        warmup = max(1, round(config.warmup_ratio * self.steps))
        share = (self.done + 1) / warmup
        if self.done >= warmup:
            passed = (self.done - warmup) / (self.steps - warmup)
            share = {
                "constant": 1.0,
                "linear": 1 - passed,
                "cosine": (1 + math.cos(math.pi * passed)) / 2,
            }[config.lr_scheduler]
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        found = self.losses(examples)
        found.pop("calibration", None)
        self.optimizer.zero_grad()
        found["loss"].backward()
        if config.max_grad_norm:
            found["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.trained, config.max_grad_norm)
        self.optimizer.step()
        self.done += 1
        return {k: float(torch.as_tensor(v).detach()) for k, v in found.items()} | {
            "lr": config.learning_rate * share,
            "bad_updates": 0.0,
        }

    def evaluate(self, examples):
        with torch.no_grad():
            return {k: float(v) for k, v in self.losses(examples).items() if k != "loss"}


@pytest.mark.parametrize("objective", CASES)
def test_steps_are_those_of_plain_training(objective, monkeypatch):
    config = SFTConfig(objective=objective, **COMMON | CASES[objective])
    given = [*pairs(5), Preference("", "7 8 9", "5"), Preference("6", "9", "9 8", margin=1.5)]
    alone = [Demonstration("5 6", "11 12 13 14")] if objective in ("hydra", "sft") else []
    held_out = [*pairs(2), Preference("8 9", "10 11", "10 11")]

    def fresh():
        model = tiny_model()
        if not config.lora_r:
            return model
        torch.manual_seed(2)
        return add_lora(model, config)

    plans, figures = [], []
    real = sft.batches

    def batches(*args, **kwargs):
        plans.append(real(*args, **kwargs))
        return plans[-1]

    class Log(Tracker):
        def log(self, step, values, stage):
            figures.append(dict(values))

    monkeypatch.setattr(sft, "batches", batches)
    model = fresh()
    arguments = config, model, Words(), given, Log(None)
    result = sft.train(*arguments, eval_pairs=held_out, demonstrations=alone)
    steps = sum(plans, [])[: result.steps]
    assert result.steps == len(figures) == round(1.75 * math.ceil((len(given) + len(alone)) / 4))
    assert len(plans) == 2 and str(plans[0]) != str(plans[1]), "each epoch has its own order"
    plain = Plain(config, fresh().eval(), len(steps))
    tested = encode_pairs(Words(), held_out, max_length=32)
    tokens = 0
    for number, (batch, reported) in enumerate(zip(steps, figures, strict=True), 1):
        expected = plain.step(batch)
        if number % 2 == 0 or number == len(steps):
            expected |= {f"eval_{k}": v for k, v in plain.evaluate(tested).items()}
        assert reported.keys() == expected.keys() | {"tokens_per_s"}
        for name, value in expected.items():
            assert reported[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        tokens += sum(len(one.prompt) + len(one.chosen) for one in batch)
        if objective != "sft":
            tokens += sum(len(one.prompt) + len(one.rejected) for one in batch if one.rejected)
    assert result.final == pytest.approx(plain.evaluate(tested), rel=1e-3, abs=1e-5)
    assert result.tokens == tokens
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(plain.trained)
    for a, b in zip(model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


def test_dropout_acts_in_training_and_nowhere_else():
    config = SFTConfig(lora_r=4, lora_dropout=0.5, batch_size=4, max_steps=2, learning_rate=1e-2)
    given = encode_pairs(Words(), pairs(4), max_length=32)
    model = add_lora(tiny_model(), config).eval()
    accelerator = sft.make_accelerator("cpu")
    modes = []
    trainer = sft.Trainer(config, model, Words(), accelerator, 2)
    model.base.register_forward_hook(lambda *_: modes.append(1))
    model.trunk.register_forward_hook(lambda module, *_: modes.append(module.training))
    trainer.step(given)
    assert modes == [True]
    assert any(module.p == 0.5 for module in model.modules() if hasattr(module, "p"))
    first = sft.evaluate(config, model, Words(), given, role="actor")
    assert modes == [True, False] and model.training
    assert sft.evaluate(config, model, Words(), given, role="actor") == first
    model.eval()
    sft.evaluate(config, model, Words(), given, role="actor")
    assert not model.training


@pytest.mark.parametrize("training", [True, False])
def test_asking_whether_a_model_can_pack_leaves_its_mode(training):
    model = make_model("gpt2", ()).train(training)  # with a dropout of 0.1
    packing.check(model, longest=8)
    assert model.training == training
    model.config.sliding_window = 8
    packing.check(model, longest=8)  # as long as the window is not beyond it


def test_a_merged_model_keeps_its_reward_head():
    model = add_lora(tiny_model(), SFTConfig(lora_r=2))
    head = model.reward_head.weight.clone()
    assert torch.equal(sft.merge_adapter(model).reward_head.weight, head)

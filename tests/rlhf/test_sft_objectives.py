"""dpo, rrhf and pro against their papers' formulas, by hand and on a model's own logits."""

import math

import pytest
import torch

from hydra_rlhf import objectives, sft
from hydra_rlhf.commands.sft import add_lora
from hydra_rlhf.errors import UserError
from hydra_rlhf.pair_loss import PairLoss
from hydra_rlhf.pairs import collate
from hydra_rlhf.records import Tracker
from hydra_rlhf.sft_config import SFTConfig
from tests.rlhf.test_sft import LONG, SHORT, Words, pairs, tiny_model


def test_dpo_by_hand():
    """beta 0.5, h_w = 1, h_l = -1: -log sigmoid(1) = 0.31326."""
    found = objectives.dpo(torch.tensor([1.0]), torch.tensor([-1.0]), beta=0.5)
    assert found.item() == pytest.approx(0.31326, abs=1e-5)


def test_rrhf_by_hand():
    """A wrong order by 0.5 costs 0.5; a right one costs nothing."""
    found = objectives.rrhf(torch.tensor([-2.0, -1.0]), torch.tensor([-1.5, -3.0]))
    assert found.item() == pytest.approx(0.5)


def test_pro_by_hand():
    """p_w = -1, p_l = -2: -log(e^-1 / (e^-1 + e^-2)) = log(1 + e^-1) = 0.31326."""
    found = objectives.pro(torch.tensor([-1.0]), torch.tensor([-2.0]))
    assert found.item() == pytest.approx(math.log1p(math.exp(-1.0)), abs=1e-6)


def response_logprobs(model, pair, response, role):
    """The log-probabilities of a response's tokens from whole logits."""
    ids = torch.tensor([pair.prompt + response])
    logits = model.forward_role(role, ids, torch.ones_like(ids))
    every = torch.log_softmax(logits.float(), -1)[0, len(pair.prompt) - 1 : -1]
    return every.gather(1, torch.tensor(response)[:, None]).squeeze(1)


def adapted(config):
    model = add_lora(tiny_model(), config)
    with torch.no_grad():
        for parameter in model.adapter_parameters("actor"):
            parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("objective", ["dpo", "rrhf", "pro"])
def test_losses_are_the_papers_on_the_models_logits(objective, side):
    config = SFTConfig(objective=objective, lora_r=2, beta=0.3)
    model = adapted(config)
    both = [SHORT, LONG]
    batch = collate(both, pad=0, side=side, predict_both=True)
    sums = PairLoss(model, config, "actor")(batch)
    expected = torch.zeros(())
    for pair in both:
        won = response_logprobs(model, pair, pair.chosen, "actor")
        lost = response_logprobs(model, pair, pair.rejected, "actor")
        if objective == "dpo":
            ratio = won.sum() - response_logprobs(model, pair, pair.chosen, "reference").sum()
            other = lost.sum() - response_logprobs(model, pair, pair.rejected, "reference").sum()
            expected += -torch.log(torch.sigmoid(0.3 * (ratio - other)))
        elif objective == "rrhf":
            expected += max(lost.mean() - won.mean(), torch.zeros(()))
        else:
            expected += torch.logsumexp(torch.stack([won.mean(), lost.mean()]), 0) - won.mean()
    torch.testing.assert_close(sums["rank"], expected, atol=1e-5, rtol=1e-5)
    text = sum(response_logprobs(model, pair, pair.chosen, "actor").sum() for pair in both)
    torch.testing.assert_close(sums["sft"], -text, atol=1e-4, rtol=1e-5)


def test_dpo_starts_at_log_two():
    """A new adapter is the reference: every ratio is 1."""
    config = SFTConfig(objective="dpo", lora_r=2)
    model = add_lora(tiny_model(), config)
    sums = PairLoss(model, config, "actor")(collate([SHORT, LONG], pad=0, predict_both=True))
    assert sums["rank"].item() == pytest.approx(2 * math.log(2.0), abs=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "rrhf", "pro"])
def test_training_ranks_the_pairs(objective):
    given = pairs(8)
    config = SFTConfig(
        objective=objective, lora_r=4, epochs=25, batch_size=8, learning_rate=2e-2, beta=0.5
    )
    model = add_lora(tiny_model(), config)
    result = sft.train(config, model, Words(), given, Tracker(None), eval_pairs=given)
    assert result.final["accuracy"] == 1.0
    assert torch.equal(model.causal_lm.lm_head.weight, tiny_model().causal_lm.lm_head.weight)


def test_dpo_needs_an_adapter():
    with pytest.raises(UserError, match="dpo needs lora_r"):
        SFTConfig(objective="dpo")

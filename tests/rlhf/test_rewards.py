"""Classifiers as reward functions, and what is done to scores before PPO, in its order."""

import copy

import pytest
import torch
import transformers

from hydra_rlhf.rewards import (
    AdaptiveKLController,
    ClassifierReward,
    RunningMoments,
    call_reward_fn,
    shape_scores,
)
from tests.rlhf.families import CONFIGS, EOS, PAD, make_tokenizer

ENDED = torch.tensor([True, False, True, True])
SCORES = torch.tensor([4.0, 2.0, -6.0, 8.0])


def test_the_missing_eos_rule_comes_before_the_moments():
    """4, -1, -6 and 8 have mean 5/4 and variance 447/12."""
    moments = RunningMoments()
    found = shape_scores(SCORES, ENDED, missing_eos_penalty=3.0, moments=moments, center=True)
    std = (((4 - 1.25) ** 2 + (-1 - 1.25) ** 2 + (-6 - 1.25) ** 2 + (8 - 1.25) ** 2) / 3) ** 0.5
    expected = [(score - 1.25) / std for score in (4.0, -1.0, -6.0, 8.0)]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    replaced = shape_scores(SCORES, ENDED, missing_eos_score=-1.0, moments=RunningMoments())
    assert replaced.tolist() == pytest.approx([s / std for s in (4, -1, -6, 8)], rel=1e-6)


def test_clipping_comes_last_and_on_both_sides():
    moments = RunningMoments()
    found = shape_scores(SCORES, ENDED, moments=moments, clip=0.9)
    assert moments.mean == 2.0, "of scores that were not clipped"
    std = float(SCORES.std())
    assert found.tolist() == pytest.approx([4 / std, 2 / std, -0.9, 0.9], rel=1e-6)


@pytest.mark.parametrize("center", [False, True])
def test_scores_that_were_all_alike_are_not_scaled(center):
    """As of a check that fails at first: there is no spread yet to divide by."""
    moments = RunningMoments()
    for score in (-1.0, 0.1):
        alike = torch.full((3,), score)
        found = shape_scores(alike, ENDED[:3], moments=RunningMoments(), center=center)
        torch.testing.assert_close(found, alike * (not center), atol=1e-6, rtol=0)
    shape_scores(torch.full((4,), -1.0), ENDED[:1].expand(4), moments=moments, center=center)
    spread = torch.tensor([-1.0, 1.0])
    found = shape_scores(spread, ENDED[:2], moments=moments, center=center)
    every = torch.tensor([-1.0] * 5 + [1.0])
    expected = (spread - center * every.mean()) / every.std()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_moments_are_those_of_every_process():
    moments = RunningMoments()
    everybody = lambda mine: torch.cat([mine, torch.tensor([100.0, 300.0])])  # noqa: E731
    shape_scores(SCORES, ENDED, moments=moments, gather=everybody)
    assert moments.count == 6 and moments.mean == pytest.approx(408 / 6)


def test_the_coefficient_falls_by_no_more_than_it_rises():
    controller = AdaptiveKLController(1.0, target=6.0, horizon=10.0)
    controller.update(-50.0, 5)
    assert controller.value == pytest.approx(1 - 0.2 * 5 / 10)


def judged(path, labels, pad_of_model, pad_of_tokenizer):
    """(scores of three texts, logits at each one's last token, passes made)."""
    config = CONFIGS["llama"]()
    config.update({"num_labels": labels, "pad_token_id": pad_of_model})
    torch.manual_seed(1)
    classifier = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    torch.nn.init.normal_(classifier.score.weight)
    classifier.save_pretrained(path)
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.pad_token = pad_of_tokenizer
    judge = ClassifierReward(path, tokenizer=tokenizer)
    assert judge.model.config.num_labels == labels and not judge.model.training
    passes = []
    judge.model.register_forward_hook(lambda *_: passes.append(1))
    texts = {"prompts": ["w3 ", "w5 w6 ", "w9 "], "completions": ["w4", "w7 w8", "w2 w2 w2 w2"]}
    rows = [[3, 4], [5, 6, 7, 8], [9, 2, 2, 2, 2]]
    if pad_of_tokenizer in (None, "<eos>") and pad_of_model is None:
        texts["completions"][0] += " <eos>"
        rows[0].append(EOS)
    scores = judge(**texts)
    with torch.no_grad():
        states = [classifier.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
        return scores, [classifier.score(state).tolist() for state in states], len(passes)


@pytest.mark.parametrize(
    ("pad_of_model", "pad_of_tokenizer", "passes"),
    [
        (PAD, "<pad>", 1),
        (None, "<pad>", 1),
        (EOS, "<eos>", 1),
        # Rows that the classifier would not find the end of are alone.
        (None, None, 3),
        (None, "<eos>", 3),
        (EOS, "<pad>", 3),
        (50, "<pad>", 3),
    ],
)
def test_a_classifier_judges_the_last_token_whatever_pads(
    pad_of_model, pad_of_tokenizer, passes, tmp_path
):
    scores, logits, made = judged(tmp_path, 1, pad_of_model, pad_of_tokenizer)
    assert scores == pytest.approx([one[0] for one in logits], rel=1e-4, abs=1e-5)
    assert made == passes


def test_of_two_labels_the_score_is_the_last_ones_log_odds(tmp_path):
    scores, logits, _ = judged(tmp_path, 2, PAD, "<pad>")
    assert scores == pytest.approx([b - a for a, b in logits], rel=1e-4, abs=1e-5)


def test_a_reward_function_gets_the_columns_that_it_names():
    seen = []

    def narrow(prompts, completions, answer):
        seen.append(answer)
        return [1.0] * len(prompts)

    columns = {"answer": [4, 5], "other": [0, 0]}
    call_reward_fn(narrow, ["p", "q"], ["a", "b"], columns, torch.device("cpu"))
    assert seen == [[4, 5]]

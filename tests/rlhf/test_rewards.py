"""What is done to scores before PPO, in its order."""

import pytest
import torch

from hydra_rlhf.rewards import AdaptiveKLController, RunningMoments, shape_scores

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


def test_moments_are_those_of_every_process():
    moments = RunningMoments()
    everybody = lambda mine: torch.cat([mine, torch.tensor([100.0, 300.0])])  # noqa: E731
    shape_scores(SCORES, ENDED, moments=moments, gather=everybody)
    assert moments.count == 6 and moments.mean == pytest.approx(408 / 6)


def test_the_coefficient_falls_by_no_more_than_it_rises():
    controller = AdaptiveKLController(1.0, target=6.0, horizon=10.0)
    controller.update(-50.0, 5)
    assert controller.value == pytest.approx(1 - 0.2 * 5 / 10)

"""Comparing policies: intervals that hold, win rates by hand, answers that a seed fixes."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from hydra_rlhf import evaluate
from hydra_rlhf.data import Prompt
from hydra_rlhf.errors import UserError
from hydra_rlhf.evaluate import Answers, ScoreJudge, judge_answers
from hydra_rlhf.statistics import Estimate, crossed_interval, distinct, mean_interval, wins

PROMPTS = [Prompt("a"), Prompt("b"), Prompt("c"), Prompt("d")]


def answers(name, *responses):
    return Answers(name, list(responses), [2] * len(responses), [True] * len(responses))


def by_length(prompts, completions, **columns):
    return [len(c) for c in completions]


# Statistics


def test_wins_by_hand():
    assert wins([1, 2, 3], [2, 2, 1]) == [0.0, 0.5, 1.0]


def test_interval_of_a_constant_is_the_constant():
    assert mean_interval([0.5] * 7) == Estimate(0.5, 0.5, 0.5)


def test_interval_is_that_of_the_normal_for_many_values():
    """mean +- 1.96 s / sqrt(n), to a few per cent of its width."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    found = mean_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.06 * half)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """Of 200 samples of a coin with p = 0.7, 95% +- 4 sd (0.015 each) of the intervals have it."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        low, high = mean_interval(rng.random(100) < 0.7, resamples=1000)[1:]
        held += low <= 0.7 <= high
    assert 0.89 <= held / 200 <= 1.0


def test_crossed_interval_draws_runs_and_prompts():
    """Runs that differ, prompts that do not, and the reverse: by the two-point bootstrap by hand.

    Of 2 runs at 0 and 1 a resample's mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4, so that
    95% of them reach from 0 to 1, however many prompts there are; and as much for 2 prompts.
    """
    assert crossed_interval([[0.0] * 50, [1.0] * 50]) == Estimate(0.5, 0.0, 1.0)
    assert crossed_interval([[0.0, 1.0]] * 50) == Estimate(0.5, 0.0, 1.0)
    assert crossed_interval([[0.25] * 3] * 4) == Estimate(0.25, 0.25, 0.25)


def test_crossed_interval_draws_runs_apart_from_prompts():
    """i - j over a square: a resample is a mean of i less one of j, each of variance 35/12 / 6."""
    found = crossed_interval([[float(i - j) for j in range(6)] for i in range(6)])
    half = 1.96 * (2 * 35 / 12 / 6) ** 0.5
    assert found == pytest.approx((0.0, -half, half), rel=0.06)


def test_crossed_interval_of_one_run_is_that_over_its_prompts():
    values = np.random.default_rng(0).normal(3.0, 2.0, 300)
    ours, plain = crossed_interval([values]), mean_interval(values)
    half = (plain.high - plain.low) / 2
    assert ours.mean == pytest.approx(plain.mean)
    assert ours.low == pytest.approx(plain.low, abs=0.06 * half)
    assert ours.high == pytest.approx(plain.high, abs=0.06 * half)


@pytest.mark.parametrize("values", [[], [[]], [[1.0], [1.0, 2.0]]], ids=["none", "empty", "ragged"])
def test_crossed_interval_needs_a_grid(values):
    with pytest.raises(ValueError, match="runs of one length"):
        crossed_interval(values)


def test_interval_needs_a_value():
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_distinct_by_hand():
    """a a a b: bigrams aa, aa, ab, two of three different."""
    assert distinct(["a a a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a"], 2) == 0.0
    assert distinct(["a b", "a b"], 2) == 0.5, "no bigram lies across two texts"


# Judging


def test_scores_and_win_rates_by_hand():
    """Lengths 1 2 3 3 against 2 2 1 1: one loss, one tie, two wins for the first."""
    found = judge_answers(
        PROMPTS,
        [answers("A", "x", "xx", "xxx", "xxx"), answers("B", "xx", "xx", "x", "x")],
        ScoreJudge("length", by_length),
    )
    first, second = found.policies
    assert first.score.mean == 2.25 and second.score.mean == 1.5
    assert first.win_rate is None
    assert (first.length, first.ended) == (2.0, 1.0)
    assert second.win_rate.mean == pytest.approx(0.375)
    assert found.win_rates[0][1].mean == pytest.approx(0.625)
    low, high = found.win_rates[0][1].low, found.win_rates[0][1].high
    assert found.win_rates[1][0].low == pytest.approx(1 - high)
    assert found.win_rates[1][0].high == pytest.approx(1 - low)
    assert found.win_rates[0][0] is None


def test_a_pair_judge_is_asked_about_every_pair():
    class Always:
        name = "always the first"
        asked = []

        def compare(self, prompts, ours, theirs):
            self.asked.append((ours[0], theirs[0]))
            return [1.0] * len(prompts)

    judge = Always()
    found = judge_answers(PROMPTS, [answers(n, *([n] * 4)) for n in ("A", "B", "C")], judge, seed=1)
    assert judge.asked == [("A", "B"), ("A", "C"), ("B", "C")]
    assert found.win_rates[0][2].mean == 1.0 and found.win_rates[2][0].mean == 0.0
    assert found.scores is None and found.policies[0].score is None


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda **given: [1.0], "1 scores for 4"),
        (lambda **given: [float("nan")] * 4, "nan"),
        (lambda **given: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_judge_that_fails_is_named(fn, message):
    with pytest.raises(UserError, match=message):
        judge_answers(PROMPTS, [answers("A", *"wxyz")], ScoreJudge("mine", fn))


def test_missing_answers_are_named():
    with pytest.raises(UserError, match="B has 1 answers for 4"):
        judge_answers(
            PROMPTS, [answers("A", *"wxyz"), answers("B", "x")], ScoreJudge("l", by_length)
        )


def test_rouge_of_the_reference_itself_is_one():
    pytest.importorskip("rouge_score", reason="rouge-score is an extra")
    prompts = [Prompt("a", {"reference": "the cat sat"}), Prompt("b", {"reference": "a dog ran"})]
    found = judge_answers(
        prompts,
        [answers("A", "the cat sat", "a dog ran"), answers("B", "no", "nothing")],
        ScoreJudge("length", by_length),
        rouge=True,
    )
    assert found.policies[0].rouge == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert found.policies[1].rouge["rougeL"] == 0.0
    with pytest.raises(UserError, match="prompt 1 has none"):
        judge_answers(PROMPTS, [answers("A", *"wxyz")], ScoreJudge("l", by_length), rouge=True)


def test_tables_and_json_hold_every_policy(tmp_path, capsys):
    found = judge_answers(
        PROMPTS,
        [answers("A", "[x]", "xx", "xxx", "x\x1b[31m"), answers("B", *"wxyz")],
        ScoreJudge("length", by_length),
    )
    from hydra_rlhf.records import make_console

    console = make_console()
    for shown in (
        evaluate.summary_table(found, "t"),
        evaluate.matrix_table(found),
        evaluate.answer_table(found, 4),
    ):
        console.print(shown)
    out = capsys.readouterr().out
    assert "[x]" in out, "brackets in an answer are not markup"
    assert "\x1b" not in out, "a model's control characters do not reach the terminal"
    assert json.loads(found.to_json())["policies"][1]["policy"] == "B"
    assert evaluate.draw(found, tmp_path / "e.png").stat().st_size > 5_000
    assert torch.is_grad_enabled()


def test_rewards_are_shown_once():
    """The reward head's column stands beside another judge's, not beside its own."""

    def columns(judge, *given):
        found = judge_answers(PROMPTS, list(given), ScoreJudge(judge, by_length))
        tables = evaluate.summary_table(found, "t"), evaluate.answer_table(found, 4)
        return ["RM reward" in [column.header for column in table.columns] for table in tables]

    plain = answers("A", *"wxyz")
    headed = dataclasses.replace(plain, rewards=[1.0, 2.0, 3.0, 4.0])
    assert columns("length", headed) == [True, True]
    assert columns("reward", headed) == [False, False]
    assert columns("length", plain) == [False, False]

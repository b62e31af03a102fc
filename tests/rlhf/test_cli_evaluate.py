"""`hydra-rlhf evaluate` and `export` on the command line."""

import json

import pytest

from hydra_rlhf import cli
from tests.rlhf.test_cli import fails, with_reward_head, write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def test_evaluate_takes_policies_as_its_first_words(model, capsys):
    line = fails(capsys, "evaluate", f"a={model}", f"b={model}", f"a={model}", "--show", "0")
    assert "same name: a, b, a" in line


def test_evaluate_looks_at_every_path_before_the_first_answer(tmp_path, model, capsys, monkeypatch):
    monkeypatch.setattr("hydra_rlhf.evaluate.answer", lambda *a, **k: pytest.fail("sampled"))
    line = fails(capsys, "evaluate", model, "./no-such", "--prompts", "bundled")
    assert "no policy ./no-such: there is no such folder" in line


def test_evaluate_without_a_judge_stops_before_the_first_answer(tmp_path, model, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "The rain."}) + "\n")
    line = fails(capsys, "evaluate", model, "--prompts", prompts, "--response-length", "4")
    assert f"{model} has no reward head; give --judge" in line
    line = fails(capsys, "evaluate", model, "--num-prompts", "1", "--response-length", "32")
    assert "response_length 32 leaves no room for a prompt in a context of 32 tokens" in line


@pytest.mark.parametrize("answers", [("completion",), ("chosen", "rejected")], ids=" ".join)
def test_rouge_is_against_the_answers_that_the_prompts_came_with(answers, tmp_path, model, capsys):
    pytest.importorskip("rouge_score", reason="rouge-score is an extra")
    judge = with_reward_head(model, tmp_path / "judge")
    prompts = tmp_path / "prompts.jsonl"
    row = {"prompt": "The rain.", **{column: f" It is {column}." for column in answers}}
    prompts.write_text(json.dumps(row) + "\n")
    sizes = ("--response-length", "4", "--show", "0", "--rouge")
    assert cli.main(["evaluate", str(judge), "--prompts", str(prompts), *sizes]) == 0
    assert "ROUGE-1/2/L" in capsys.readouterr().out


def test_evaluate_says_when_the_judge_is_what_ppo_trains_against(tmp_path, model, capsys):
    judge = with_reward_head(model, tmp_path / "judge")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "The rain."}) + "\n")
    sizes = ("--response-length", "4", "--show", "0")
    assert cli.main(["evaluate", str(judge), "--prompts", str(prompts), *sizes]) == 0
    assert "judged by the reward head that PPO trains against" in capsys.readouterr().out


def test_evaluate_wants_policies_that_exist(tmp_path, model, capsys):
    assert "./no-such" in fails(capsys, "evaluate", "--policies", "./no-such")
    assert "same name" in fails(capsys, "evaluate", "--policies", f"a={model}", f"a={model}")


def test_export_finds_the_policy_in_a_run_folder(tmp_path, monkeypatch):
    (tmp_path / "actor").mkdir()
    (tmp_path / "run.json").write_text("{}")
    given = []
    monkeypatch.setattr("hydra_rlhf.export.merge_adapter", lambda *a, **k: given.append(a))
    assert cli.main(["export", str(tmp_path), str(tmp_path / "out"), "--merge"]) == 0
    assert given == [(str(tmp_path / "actor"), str(tmp_path / "out"))]

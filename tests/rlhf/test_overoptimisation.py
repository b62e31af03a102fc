"""Curves along a run: its checkpoints in order, the rewards that it names, gains by hand."""

import json
import shutil

import pytest
import torch

from hydra_rlhf import cli, overoptimisation
from hydra_rlhf.data import Prompt
from hydra_rlhf.errors import UserError
from hydra_rlhf.evaluate import ScoreJudge
from hydra_rlhf.model import HydraModel
from hydra_rlhf.overoptimisation import Curve, Point, follow, open_run
from hydra_rlhf.rollout import Sampling
from hydra_rlhf.statistics import Estimate
from tests.rlhf.test_cli import fails, model, pairs  # noqa: F401  fixtures

PROMPTS = [Prompt("The rain.", {"n": i}) for i in range(4)]
SAMPLING = Sampling(4, 1.0, (2,), 0)


def by_length(prompts, completions, **columns):
    assert columns["n"] == [0, 1, 2, 3]
    return [len(completion) for completion in completions]


def point(step, kl, learned, judged):
    def exactly(x):
        return Estimate(x, x - 0.5, x + 0.5)

    return Point(step, kl, exactly(learned), exactly(judged), None, 5.0)


@pytest.fixture(scope="module")
def start(model, tmp_path_factory):  # noqa: F811
    """The tiny checkpoint with a reward head."""
    path = tmp_path_factory.mktemp("start") / "model"
    shutil.copytree(model, path)
    hydra = HydraModel.from_pretrained(path)
    torch.manual_seed(0)
    torch.nn.init.normal_(hydra.reward_head.weight)
    hydra.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """A run of each kind of adapter: three steps, checkpoints of two, a large learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "The rain."}) + "\n")
    for method in ("hydra-ppo", "j-hydra-ppo"):
        argv = f"""ppo --method {method} --sft-model-path {start} --max-steps 3 --save-steps 1
            --save-total-limit 2 --prompts {folder}/prompts.jsonl --output-dir {folder}/{method}
            --response-length 4 --lora-r 2 --per-device-train-batch-size 4
            --learning-rate 3e-2 --temperature 1.0""".split()
        assert cli.main(argv) == 0
    return folder


@pytest.mark.parametrize("method", ["hydra-ppo", "j-hydra-ppo"])
def test_every_checkpoint_answers_in_order(runs, method):
    done = []
    run = open_run(runs / method)
    curve = follow("a", run, PROMPTS, ScoreJudge("length", by_length), SAMPLING,
                   on_policy=done.append)  # fmt: skip
    assert [p.step for p in curve.points] == [0, 2, 3] and done == [1, 2, 3]
    assert curve.points[0].kl == 0.0 and curve.points[0].win_rate is None
    kls = [abs(p.kl) for p in curve.points[1:]]
    assert all(kl > 1e-4 for kl in kls) and kls[0] != kls[1]
    assert curve.judged_scale > 0 and curve.learned_scale > 0


def test_the_last_adapter_counts_where_no_checkpoint_is_of_the_end(runs, tmp_path):
    shutil.copytree(runs / "hydra-ppo", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")
    steps = [step for step, _ in open_run(tmp_path / "run").adapters]
    assert steps == [2, 3]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no checkpoints to follow: train with --save-steps"):
        open_run(tmp_path / "run")


def test_a_damaged_checkpoint_is_passed_over(runs, tmp_path, caplog):
    shutil.copytree(runs / "hydra-ppo", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "trained.safetensors").write_bytes(b"x")
    assert [step for step, _ in open_run(tmp_path / "run").adapters] == [3]
    assert "step-00000002 is damaged" in caplog.text


@pytest.mark.parametrize("kind", ["function", "model"])
def test_the_learned_reward_is_what_the_run_names(runs, start, tmp_path, kind, monkeypatch):
    """A reward function, or the head of another model: here the start's, times minus two."""
    shutil.copytree(runs / "hydra-ppo", tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    judge = ScoreJudge("length", by_length)
    if kind == "function":
        changed = config.replace("reward_fn: null", "reward_fn: rewards_for_a_test:by_length")
        (tmp_path / "rewards_for_a_test.py").write_text(
            "def by_length(prompts, completions, **columns):\n"
            "    return [len(completion) for completion in completions]\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
    else:
        other = HydraModel.from_pretrained(start)
        with torch.no_grad():
            other.reward_head.weight.mul_(-2.0)
        other.save_pretrained(tmp_path / "rm")
        changed = config.replace("reward_model_path: null", f"reward_model_path: {tmp_path}/rm")
    assert changed != config
    (tmp_path / "run" / "config.yaml").write_text(changed)
    own = follow("a", open_run(runs / "hydra-ppo"), PROMPTS, judge, SAMPLING)
    found = follow("a", open_run(tmp_path / "run"), PROMPTS, judge, SAMPLING)
    for ours, named in zip(own.points, found.points, strict=True):
        expected = ours.judged.mean if kind == "function" else -2.0 * ours.learned.mean
        assert named.learned.mean == pytest.approx(expected, rel=1e-4)
        assert named.kl == ours.kl


def test_gains_and_verdict_by_hand():
    """In standard deviations of the start: 2 for what was trained on, 0.5 for the judge."""
    points = [point(0, 0.0, 1.0, 0.5), point(5, 4.0, 3.0, 0.75), point(9, 9.0, 5.0, 0.25)]
    curve = Curve("run", "gold", 2.0, 0.5, points)
    assert [gain.mean for gain in curve.gains("learned")] == [0.0, 1.0, 2.0]
    assert curve.gains("judged")[1] == Estimate(0.5, -0.5, 1.5)
    assert curve.best is points[1]
    assert curve.verdict() == (
        "run: gold is highest at KL 4.0, step 5; after it the learned reward went from 3.00 to "
        "5.00, gold from 0.750 to 0.250"
    )
    assert Curve("r", "gold", 2.0, 0.5, points[:2]).verdict().endswith("KL 4.0, the last step")


def test_the_command_writes_table_json_and_picture(runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "judge_for_a_test.py").write_text(
        "def letters(prompts, completions, **columns):\n"
        "    return [len(completion) for completion in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    argv = ["evaluate", "--along", "--policies", runs / "hydra-ppo", f"J={runs / 'j-hydra-ppo'}"]
    argv += ["--prompts", runs / "prompts.jsonl", "--judge", "judge_for_a_test:letters"]
    argv += ["--response-length", "4", "--output", tmp_path / "out"]
    assert cli.main([str(a) for a in argv]) == 0
    shown = capsys.readouterr().out
    assert "Along hydra-ppo" in shown and "Along J" in shown and "is highest at KL" in shown
    curves = json.loads((tmp_path / "out" / "overoptimisation.json").read_text())
    assert [curve["run"] for curve in curves] == ["hydra-ppo", "J"]
    assert [point["step"] for point in curves[1]["points"]] == [0, 2, 3]
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib, of the extra 'plot'")
    assert (tmp_path / "out" / "overoptimisation.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_followed_is_said(runs, start, tmp_path, capsys):
    along = ("evaluate", "--along", "--policies")
    assert "no run folder of hydra-rlhf ppo" in fails(capsys, *along, start)
    line = fails(capsys, *along, runs / "hydra-ppo", "--judge", "reward")
    assert "--along needs a judge that scores answers and was not trained on" in line
    shutil.copytree(runs / "hydra-ppo", tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("method: hydra-ppo", "method: ppo"))
    assert "checkpoints of method ppo are no models" in fails(capsys, *along, tmp_path / "run")


def test_two_readings_are_one(runs):
    """Sampling is of the seed: nothing of the machine's state is in a curve."""
    torch.rand(3)
    judge = ScoreJudge("length", by_length)
    first, second = (
        overoptimisation.to_json(
            [follow("a", open_run(runs / "hydra-ppo"), PROMPTS, judge, SAMPLING)]
        )
        for _ in range(2)
    )
    assert first == second

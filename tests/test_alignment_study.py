"""The study goes on where it stopped, gives each seed the same start, and mixes nothing."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import alignment_study
from benchmarks.alignment_study import ARMS, BY_NAME, START, Study, read
from benchmarks.gradient_surgery import surgery
from hydra_rlhf import demo, update
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.model import HydraModel

SCALE = replace(
    demo.QUICK,
    num_pairs=48,
    num_eval_pairs=8,
    num_eval_prompts=4,
    ppo=replace(demo.QUICK.ppo, max_steps=2, response_length=6, lora_r=2),
)
HYDRA_PPO = BY_NAME["Hydra-PPO"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return Study(SCALE, folder / "records.jsonl", folder / "work")


@pytest.fixture(scope="module")
def record(study):
    return study.run(HYDRA_PPO, 3)


def test_an_arm_brings_what_it_starts_from(study, record):
    """Only the arm asked for has a record; its bases are there as checkpoints."""
    assert study.done() == {(3, "Hydra-PPO")}
    assert [path.name for path in (study.work / "seed-3").iterdir()] == ["hydra-sft"]
    assert [path.name for path in (study.work / "every-seed").iterdir()] == ["start"]


def test_a_record_says_what_was_run_and_found(study, record):
    (kept,) = read(study.records)
    assert kept["commit"] and kept["device"] and kept["versions"]["torch"]
    assert kept["settings"]["method"] == "hydra-ppo" and kept["settings"]["max_steps"] == 2
    assert len(kept["scores"]) == 4
    assert kept["gold"] == pytest.approx(sum(kept["scores"]) / 4, abs=1e-4)
    assert len(kept["curves"]["value_loss"]) == 2 and all(kept["curves"]["value_loss"])
    # More than the frozen weights, less than four times them: adapters alone are trained.
    model = HydraModel.from_pretrained(study.path("Hydra-SFT", 3))
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert held < kept["static_bytes"] < 2 * held


def test_an_arm_again_is_the_same(study, record, tmp_path):
    """From nothing, in a folder of its own: a study that was split over machines is one study."""
    other = Study(SCALE, tmp_path / "records.jsonl", tmp_path / "work").run(HYDRA_PPO, 3)
    for name in ("scores", "curves", "kl", "reward"):
        assert other[name] == record[name], name


def test_the_start_is_trained_once(study, record, tmp_path, monkeypatch):
    """Every seed answers with it; its weights are of one seed."""
    monkeypatch.setattr(Study, "train", None)
    other = Study(SCALE, tmp_path / "records.jsonl", study.work.parent)
    first, second = (other.run(BY_NAME[START], seed) for seed in (3, 4))
    assert "kl" not in first and first["static_bytes"] == second["static_bytes"]
    assert first["examples"] != second["examples"]


def test_what_is_done_is_not_done_again(study, record, monkeypatch):
    ran = []
    monkeypatch.setattr(Study, "run", lambda self, arm, seed: ran.append((seed, arm.name)) or {})
    monkeypatch.setattr(alignment_study.demo, "QUICK", SCALE)
    arguments = ["--quick", "--seeds", "2,3", "--records", str(study.records)]
    with pytest.raises(KeyError, match="wall_s"):  # the printed line of the first arm that ran
        alignment_study.main([*arguments, "--arms", "Hydra-PPO"])
    assert ran == [(2, "Hydra-PPO")]
    ran.clear()
    alignment_study.main([*arguments[:2], "3", *arguments[3:], "--arms", "Hydra-PPO"])
    assert ran == []


@pytest.mark.parametrize(
    ("scale", "name"),
    [
        (replace(SCALE, num_eval_prompts=5), "num_eval_prompts"),
        (replace(SCALE, ppo=replace(SCALE.ppo, kl_coef=0.2, gamma=0.9)), "gamma, kl_coef"),
    ],
    ids=["prompts", "settings"],
)
def test_other_settings_are_refused(study, record, scale, name):
    other = Study(scale, study.records, study.work.parent)
    with pytest.raises(SystemExit, match=f"Hydra-PPO was run with another {name}$"):
        other.done()
    assert other.work != study.work


def test_settings_that_came_later_do_not_count(study, record, tmp_path):
    (kept,) = read(study.records)
    kept["settings"].pop("detach_values")
    (tmp_path / "records.jsonl").write_text(json.dumps(kept) + "\n")
    other = Study(SCALE, tmp_path / "records.jsonl", study.work.parent)
    assert other.done() == {(3, "Hydra-PPO")}


def test_a_torn_line_is_neither_read_nor_written_into(study, record, tmp_path):
    whole = study.records.read_text()
    torn = tmp_path / "torn.jsonl"
    torn.write_text(whole + whole[:40])
    assert len(read(torn)) == 1
    other = Study(SCALE, torn, study.work.parent)
    other.append({**record, "seed": 4})
    assert {one["seed"] for one in read(torn)} == {3, 4}


def test_timing_is_a_record_of_its_own(study, record, tmp_path):
    other = Study(SCALE, tmp_path / "records.jsonl", study.work.parent)
    other.time([HYDRA_PPO, BY_NAME["SFT"]], 3, rounds=1)
    found = {one["arm"]: one for one in read(other.records)}
    assert {one["kind"] for one in found.values()} == {"timing"}
    assert found["SFT"]["steps"] == alignment_study.TIMED_STEPS["sft"] - 1
    for one in found.values():
        assert 0 < one["p20"] <= one["s_per_sample"] <= one["p80"]
    assert not study.path("SFT", 3).exists()  # a few steps are no checkpoint


def test_critics_start_from_what_they_are_named_after(study, record, monkeypatch):
    heads = {}

    def stop(config, models, *rest, **kwargs):
        heads[name] = models.critic.value_head.weight.clone()
        raise KeyboardInterrupt

    monkeypatch.setattr(alignment_study.ppo, "train", stop)
    reward = HydraModel.from_pretrained(study.path("Hydra-SFT", 3)).reward_head.weight
    for name in (name for name, arm in BY_NAME.items() if arm.group == "critic"):
        with pytest.raises(KeyboardInterrupt):
            study.run(BY_NAME[name], 3)
    assert torch.equal(heads["Hydra-PPO, critic from the reward head"], reward)
    assert not heads["Hydra-PPO, critic from zero"].any()
    noise = heads["Hydra-PPO, critic from noise"]
    assert noise.all() and not torch.equal(noise, reward)


@pytest.mark.parametrize(
    ("pull", "expected"), [(-2.0, [1.0, 3.0]), (2.0, [3.0, 3.0])], ids=["against", "along"]
)
def test_surgery_takes_what_opposes_the_policy(pull, expected, monkeypatch):
    """p = (1, 0); a value gradient (-2, 3) becomes (0, 3), and (2, 3) stays, beside p itself."""
    joint, head = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    figures = {"policy_loss": joint[0], "value_loss": pull * joint[0] + 3 * joint[1] + head[0]}
    monkeypatch.setattr(update, "ppo_losses", lambda *_: iter([(torch.zeros(()), figures)]))
    models = SimpleNamespace(actor_parameters=lambda: [joint], critic_parameters=lambda: [head])
    before = update.ppo_losses
    with surgery():
        ((loss, _),) = update.ppo_losses(PPOConfig(vf_coef=1.0), models)
    assert update.ppo_losses is before
    loss.backward()
    assert joint.grad.tolist() == expected
    assert head.grad.tolist() == [1.0]


def test_every_arm_has_what_it_needs():
    assert ARMS[0].name == START
    for i, arm in enumerate(ARMS[1:], start=1):
        before = [one.name for one in ARMS[:i]]
        assert arm.base in before
        assert arm.reward in {*before, arm.name, ""}


def test_records_in_the_repository_are_of_committed_code():
    for path in sorted((alignment_study.machine.ROOT / "benchmarks/results").rglob("align*/*")):
        for line in path.read_text().splitlines():
            assert not json.loads(line)["commit"].endswith("-dirty"), path

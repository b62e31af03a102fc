"""The demo in its quick form: every file it promises, loadable as promised, twice the same."""

import contextlib
import io
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hydra_rlhf import cli
from hydra_rlhf.data import bundled
from hydra_rlhf.evaluate import load_policy
from hydra_rlhf.model import REWARD_HEAD, VALUE_HEAD, HydraModel
from hydra_rlhf.records import read_metrics

TIMED = re.compile(r"^time$|per_s|seconds|^perf/|^time/|^memory/")


def run_demo(folder, *flags):
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        code = cli.main(["demo", "--quick", "--output-dir", str(folder), "--device", "cpu", *flags])
    assert code == 0
    return screen.getvalue()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Its folder, its screen, and whether adapters were saved at each call of the gold reward."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    calls = []
    original = bundled.gold_reward

    def watched(prompt, response):
        calls.append((folder / "ppo" / "actor" / "adapter_model.safetensors").exists())
        return original(prompt, response)

    bundled.gold_reward = watched
    try:
        screen = run_demo(folder)
    finally:
        bundled.gold_reward = original
    return folder, screen, calls


def test_the_folder_holds_what_is_promised(demo):
    folder, _, _ = demo
    for name in (
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "README.md",
        "curves.png",
        "evaluation.json",
        "sft/config.json",
        "sft/model.safetensors",
        "sft/tokenizer.json",
        "sft/heads/reward_head.safetensors",
        "ppo/actor/adapter_model.safetensors",
        "ppo/critic/adapter_model.safetensors",
        "ppo/heads/value_head.safetensors",
        "ppo/heads/reward_head.safetensors",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard").glob("events*"))
    assert not list(folder.rglob("*.partial"))


def test_the_screen_has_every_stage_and_no_control_characters(demo):
    _, screen, _ = demo
    assert all(c.isprintable() or c == "\n" for c in screen)
    for part in ("Hydra-SFT", "Hydra-PPO", "Evaluation", "win rate vs SFT", "held-out prompts"):
        assert part in screen


def test_training_never_sees_the_gold_reward(demo):
    """It is called only once the trained adapters are on disk: for both policies' answers."""
    folder, _, calls = demo
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert len(calls) == 2 * evaluation["num_prompts"] and all(calls)


def test_evaluation_prompts_are_in_no_pair():
    held_out = {prompt.prompt for prompt in bundled.demo_prompts("test")}
    for split in ("train", "test"):
        assert not held_out & {pair.prompt for pair in bundled.demo_pairs(split)}
    assert not held_out & {prompt.prompt for prompt in bundled.demo_prompts("train")}


def test_metrics_have_the_figures_of_each_stage(demo):
    lines = read_metrics(demo[0])
    sft = [line for line in lines if line["stage"] == "sft"]
    ppo = [line for line in lines if line["stage"] == "ppo"]
    assert {"loss", "sft_loss", "rm_loss", "accuracy", "lr"} <= set(sft[0])
    assert "eval_accuracy" in sft[-1] and "eval_calibration" in sft[-1]
    assert {
        "objective/scores",
        "objective/kl",
        "objective/response_length",
        "policy/entropy_avg",
        "policy/clipfrac_avg",
    } <= set(ppo[0])
    assert abs(ppo[0]["objective/kl"]) < 1e-4, "the actor starts as the reference"


def test_the_reward_head_stays_frozen_and_the_value_head_moves(demo):
    folder = demo[0]
    sft = load_file(folder / "sft" / REWARD_HEAD)["weight"]
    assert torch.equal(load_file(folder / "ppo" / REWARD_HEAD)["weight"], sft)
    assert not torch.equal(load_file(folder / "ppo" / VALUE_HEAD)["weight"], sft)


@torch.no_grad()
def test_the_code_in_the_readme_loads_the_policy(demo):
    """As the README says: plain transformers and PEFT; its logits are the actor's."""
    folder = demo[0]
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S).group(1)
    names = {}
    exec(code, names)
    ids = names["tokenizer"]("Tell me about the rain.", return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    theirs = names["policy"].eval()(input_ids=ids, attention_mask=mask).logits
    base = AutoModelForCausalLM.from_pretrained(folder / "sft")(input_ids=ids).logits
    assert not torch.allclose(theirs, base)
    merged, _ = load_policy(folder)
    torch.testing.assert_close(
        merged.forward_role("reference", ids, mask), theirs, atol=1e-5, rtol=1e-4
    )
    from hydra_rlhf.model import default_lora_config

    plain = HydraModel.from_pretrained(folder / "sft")
    hydra = HydraModel(
        plain.causal_lm,
        adapters=("actor", "critic"),
        lora_config=default_lora_config(plain.causal_lm, r=4, lora_alpha=32),
    )
    hydra.load_adapters(folder / "ppo")
    torch.testing.assert_close(hydra.forward_role("actor", ids, mask), theirs, atol=1e-5, rtol=1e-4)


def test_the_tokenizer_on_disk_is_the_one_that_trained(demo):
    folder = demo[0]
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft")
    text = "What is the story like by the river? The story is lovely."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_a_second_run_gives_the_same_numbers(demo, tmp_path):
    folder = demo[0]
    run_demo(tmp_path / "again")

    def numbers(path):
        return [
            {k: v for k, v in line.items() if not TIMED.search(k)} for line in read_metrics(path)
        ]

    assert numbers(folder) == numbers(tmp_path / "again")
    first = json.loads((folder / "evaluation.json").read_text())
    assert first == json.loads((tmp_path / "again" / "evaluation.json").read_text())


def test_another_run_is_not_overwritten(demo, capsys):
    folder = demo[0]
    before = (folder / "metrics.jsonl").read_bytes()
    assert cli.main(["demo", "--quick", "--output-dir", str(folder)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_evaluate_compares_the_folder_with_its_sft_model(demo, tmp_path, capsys):
    folder = demo[0]
    out = tmp_path / "evaluation"
    code = cli.main(
        [
            *("evaluate", "--policies", f"SFT={folder}/sft", f"PPO={folder}"),
            *("--num-prompts", "6", "--response-length", "8", "--output", str(out)),
        ]
    )
    assert code == 0
    found = json.loads((out / "evaluation.json").read_text())
    assert [p["policy"] for p in found["policies"]] == ["SFT", "PPO"]
    assert (out / "evaluation.png").exists()
    assert "gold" in capsys.readouterr().out

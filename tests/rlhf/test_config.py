"""PPO's settings: defaults, schedules, and what is refused in one line."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser

from hydra_rlhf.config import PPOConfig
from hydra_rlhf.errors import UserError
from hydra_rlhf.methods import build_method, models_of
from hydra_rlhf.model import REWARD_HEAD, HydraModel
from hydra_rlhf.schedule import PromptBatches, lr_factor, sampling_seeds, seed_everything
from tests.rlhf.families import make_lm, make_model
from tests.rlhf.test_ppo import run, settings


def test_batches_pass_over_every_prompt():
    drawn = list(itertools.islice(PromptBatches(10, 4, seed=0), 5))
    assert sorted(itertools.chain(*drawn)) == sorted([*range(10), *range(10)])
    assert drawn == list(itertools.islice(PromptBatches(10, 4, seed=0), 5))
    assert all(len(batch) == 7 for batch in itertools.islice(PromptBatches(3, 7, seed=0), 3))


def test_everything_that_draws_is_of_the_seed():
    assert not set(sampling_seeds(3, 1, 64)) & set(sampling_seeds(4, 1, 64))
    drawn = []
    for seed in (5, 5, 6):
        seed_everything(seed)
        drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[1], drawn[2], strict=True))


def test_batches_are_in_a_new_order_each_time_and_for_each_seed():
    drawn = list(itertools.islice(PromptBatches(20, 20, seed=0), 3))
    orders = [*drawn, next(PromptBatches(20, 20, seed=1)), list(range(20))]
    assert len(set(map(tuple, orders))) == 5


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [1 / 3, 2 / 3, 1.0, 0.853553, 0.5, 0.146447, 0.0]),
        ("constant", [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_by_hand(kind, expected):
    config = settings(lr_scheduler_type=kind, warmup_steps=2)
    factors = [lr_factor(config, done, 6) for done in range(7)]
    assert factors == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "grpo"}, "method must be one of"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_k": -1}, "top_k must not be negative, got -1"),
        ({"min_response_length": -2}, "min_response_length must not be negative, got -2"),
        ({"cliprange": 1.0}, "cliprange must be in"),
        ({"response_length": 0}, "response_length must be at least 1"),
        ({"response_length": 64}, "leaves no room for a prompt"),
        ({"max_prompt_length": 2}, "more than 2"),
        ({"lora_last_k": 9}, "the model has 2 blocks"),
        ({"lora_last_k": 1, "lora_layers_to_transform": [1]}, "exclude each other"),
        ({"lora_layers_to_transform": [7]}, "leaves the model's 2 blocks"),
        ({"top_k": 5, "rollout_logprobs": "reuse"}, "top_k is 5, not 0"),
        ({"use_score_norm": True}, "needs use_score_scaling"),
        ({"stop_token": "w3 w4"}, "is 2 tokens, not one"),
        ({"stop_token_id": 1000}, "is not in the tokenizer"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        run(settings(**changes))
    assert "\n" not in str(caught.value)


def test_refuses_prompts_and_models_that_cannot_work(tmp_path):
    with pytest.raises(UserError, match="no prompts"):
        run(settings(), prompts=[])
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        run(settings(), prompts=[""])
    with pytest.raises(UserError, match="cannot run on one model with adapters"):
        run(settings(), make_model("llama", ("joint",)))
    no_head = HydraModel(make_lm("llama"))
    no_head.save_pretrained(tmp_path)
    (tmp_path / REWARD_HEAD).unlink()
    with pytest.raises(UserError, match="has no reward head"):
        build_method("hydra-ppo", tmp_path)
    with pytest.raises(UserError, match="separate reward model is for"):
        build_method("hydra-ppo", tmp_path, tmp_path)
    with pytest.raises(UserError, match="sft_model_path is needed"):
        models_of(settings())


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda n: [1.0] * (n - 1), "gave 7 scores for 8 responses"),
        (lambda n: [math.nan] * n, "gave nan for"),
        (lambda n: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_reward_function_faults_are_named(scores, message):
    def broken(prompts, completions):
        return scores(len(prompts))

    with pytest.raises(UserError, match=f"reward function broken {message}"):
        run(settings(), reward_fn=broken)


def test_every_field_is_documented_and_parsed():
    import dataclasses

    for f in dataclasses.fields(PPOConfig):
        help_text = f.metadata.get("help", "")
        assert help_text.endswith("]") and "[" in help_text, f.name
    parser = HfArgumentParser(PPOConfig)
    (config,) = parser.parse_args_into_dataclasses(
        "--method j-hydra-ppo --lora_last_k 2 --kl_coef 0.1 --whiten_rewards "
        "--lora_layers_to_transform 1 2 --no_share_prefix --stop_token_id 3".split()
    )
    assert config.method == "j-hydra-ppo" and config.lora_last_k == 2
    assert config.whiten_rewards and not config.share_prefix
    assert config.lora_layers_to_transform == [1, 2] and config.stop_token_id == 3


def test_defaults_are_the_published_settings():
    config = PPOConfig()
    assert (config.cliprange, config.cliprange_value) == (0.2, 0.2)
    assert (config.gamma, config.lam, config.vf_coef) == (1.0, 0.95, 0.1)
    assert (config.kl_coef, config.num_ppo_epochs) == (0.05, 4)
    assert config.adam_epsilon == 1e-5
    config.validate()

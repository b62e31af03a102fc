"""The PPO loop: what must hold before and after updates, and a task every method must solve."""

import copy
import itertools
import math

import pytest
import torch
from accelerate.state import AcceleratorState

from hydra_rlhf import engine, ppo
from hydra_rlhf.config import METHODS, PPOConfig
from hydra_rlhf.errors import UserError
from hydra_rlhf.methods import MethodModels, method_from_model
from hydra_rlhf.metrics import diagnose, explained_variance
from hydra_rlhf.model import HydraModel
from tests.rlhf.families import MORE, PROMPTS, THREE, batch, make_lm, make_model, make_tokenizer

ONE_MODEL = ("j-hydra-ppo", "hydra-ppo")


def settings(**changes) -> PPOConfig:
    small = dict(
        method="hydra-ppo",
        lora_r=4,
        max_steps=2,
        per_device_train_batch_size=4,
        num_mini_batches=2,
        num_ppo_epochs=2,
        response_length=5,
        temperature=0.8,
        learning_rate=1e-2,
        seed=3,
    )
    return PPOConfig(**{**small, **changes})


def word_reward(prompts, completions, **columns):
    """Share of w3 among two words."""
    return [completion.split().count("w3") / 2 for completion in completions]


def plain_model(family="llama", **changes) -> HydraModel:
    torch.manual_seed(7)
    lm = make_lm(family, **{"num_hidden_layers": 2, **changes})
    width = lm.get_output_embeddings().weight.shape[1]
    return HydraModel(lm, reward_head=torch.nn.Linear(width, 1, bias=False))


def run(config, model=None, reward_fn=None, prompts=PROMPTS, **kwargs):
    model = plain_model() if model is None else model
    return ppo.train(config, model, make_tokenizer(), prompts, reward_fn=reward_fn, **kwargs)


@pytest.mark.parametrize("method", METHODS)
def test_two_token_task(method):
    """Of two words, the rewarded one goes from a fifth of the samples to nearly all."""
    model = plain_model(vocab_size=4)
    lr = 4e-3 if method == "ppo" else 2e-2
    config = settings(
        method=method,
        max_steps=12,
        per_device_train_batch_size=32,
        num_mini_batches=1,
        num_ppo_epochs=4,
        response_length=2,
        temperature=1.0,
        learning_rate=lr,
        critic_learning_rate=2e-2,
        lr_scheduler_type="constant",
        kl_coef=0.0,
    )
    result = run(config, model, word_reward, ["w2 w3", "w3", "w3 w2 w2"])
    scores = [m["objective/scores"] for m in result.metrics]
    assert scores[0] < 0.4
    assert sum(scores[-3:]) / 3 > 0.9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", THREE)
def test_before_the_first_update(family, method):
    """The first minibatch finds ratio 1 and KL 0, bit for bit."""
    config = settings(method=method, max_steps=1, num_ppo_epochs=1, num_mini_batches=1)
    metrics = run(config, plain_model(family)).metrics[0]
    assert metrics["val/ratio"] == 1.0
    assert metrics["val/ratio_max"] == 1.0
    assert metrics["objective/kl"] == 0.0
    assert metrics["policy/approxkl_avg"] == 0.0
    assert metrics["policy/clipfrac_avg"] == 0.0


@pytest.mark.parametrize("family", MORE)
def test_rollouts_of_families_that_nothing_was_written_for(family):
    """Generation draws from the policy that is scored, whoever generates; then ratio 1 and KL 0."""
    lm = make_lm(family)
    model = HydraModel(lm, reward_head=torch.nn.Linear(32, 1, bias=False))
    config = settings(num_mini_batches=1, max_steps=1, rollout_logprobs="check")
    metrics = run(config, model).metrics[0]
    assert metrics["val/ratio_first"] == 1.0 and metrics["objective/kl"] == 0.0


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("family", THREE)
def test_after_ten_updates_adapter_off_is_the_sft_checkpoint(family, method):
    model = plain_model(family)
    before = copy.deepcopy(model.state_dict())
    ids, mask, response_mask = inputs = batch()
    with torch.no_grad():
        expected = model.score(*inputs, roles=("reference", "reward"))
        logits = model.forward_role("reference", ids, mask)
    config = settings(method=method, max_steps=3, num_mini_batches=2, num_ppo_epochs=2)
    assert config.max_steps * config.num_mini_batches * config.num_ppo_epochs >= 10
    models = run(config, model).models
    with torch.no_grad():
        after = models.score(*inputs)
        assert torch.equal(after.ref_logprobs, expected.ref_logprobs)
        assert torch.equal(after.scores, expected.scores)
        assert torch.equal(models.reference.forward_role("reference", ids, mask), logits)
    assert not torch.equal(after.logprobs, after.ref_logprobs), "the actor did not move"
    for one in models:
        state = {k.replace(".base_layer", ""): v for k, v in one.causal_lm.state_dict().items()}
        for name, value in before.items():
            if name.startswith("base."):
                assert torch.equal(state[name.removeprefix("base.")], value), name


def test_full_ppo_leaves_reference_and_reward_alone():
    model = plain_model()
    inputs = batch()
    with torch.no_grad():
        expected = model.score(*inputs, roles=("reference", "reward"))
    models = run(settings(method="ppo"), model).models
    with torch.no_grad():
        after = models.score(*inputs)
    assert torch.equal(after.ref_logprobs, expected.ref_logprobs)
    assert torch.equal(after.scores, expected.scores)
    assert not torch.equal(after.logprobs, after.ref_logprobs)


@pytest.mark.parametrize("method", METHODS)
def test_models_held_and_passes(method):
    """As the README's table says."""
    models = method_from_model(method, plain_model(), lora=settings())
    held = dict(zip(METHODS, (4, 4, 2, 1, 1), strict=True))[method]
    passes = dict(zip(METHODS, (4, 4, 4, 2, 3), strict=True))[method]
    adapters = dict(zip(METHODS, (0, 2, 2, 1, 2), strict=True))[method]
    assert len(models.distinct) == held
    assert models.num_passes() == passes
    assert sum(len(model.adapters) for model in models) == adapters
    count = []
    for model in models:
        model.trunk.register_forward_hook(lambda *_: count.append(1))
    with torch.no_grad():
        models.score(*batch())
    assert len(count) == passes


def test_methods_on_adapters_agree():
    """lora-ppo, d-lora-ppo and hydra-ppo train the same adapters from the same seed.

    To float32's rounding: rows that share an adapter are computed in another order than rows of
    several adapters in one batch, which is how hydra-ppo scores.
    """
    found = {}
    for method in ("lora-ppo", "d-lora-ppo", "hydra-ppo"):
        metrics = run(settings(method=method)).metrics
        names = ("objective/scores", "loss/value_avg", "lr")
        found[method] = [m[name] for m in metrics for name in names]
    for method in ("d-lora-ppo", "hydra-ppo"):
        assert found[method] == pytest.approx(found["lora-ppo"], rel=1e-6), method


def numbers(result):
    timed = ("time/", "memory/", "perf/")
    return [{k: v for k, v in m.items() if not k.startswith(timed)} for m in result.metrics]


@pytest.mark.parametrize("method", ONE_MODEL)
def test_same_seed_same_numbers(method):
    first, second, other = (
        run(settings(method=method, seed=seed, max_steps=1)) for seed in (3, 3, 4)
    )
    assert numbers(first) == numbers(second)
    assert numbers(first) != numbers(other)


@pytest.mark.parametrize("method", METHODS[1:])
def test_shared_prefix_changes_nothing(method):
    with_prefix = run(settings(method=method, lora_last_k=1))
    without = run(settings(method=method, lora_layers_to_transform=[1], share_prefix=False))
    reported = numbers(with_prefix)
    for metrics in reported:
        saved = [metrics.pop(f"reuse/prefix_{name}") for name in ("flops_saved", "bytes_held")]
        assert metrics.pop("reuse/prefix_bytes_saved") > 0 and min(saved) > 0
    assert reported == numbers(without)


@pytest.mark.parametrize("method", ["d-lora-ppo", "hydra-ppo", "j-hydra-ppo"])
def test_prefix_of_the_rollout_trains_the_same(method):
    """Losses to float32's rounding; of one model, the rollout's activations spare a pass."""
    reports = {}
    for source in ("scoring", "rollout"):
        reports[source] = numbers(run(settings(method=method, lora_last_k=1, prefix_source=source)))
    for kept, computed in zip(reports["rollout"], reports["scoring"], strict=True):
        saved = "reuse/prefix_flops_saved"
        assert kept.pop(saved) > computed.pop(saved)
        assert kept.pop("reuse/prefix_bytes_saved") > computed.pop("reuse/prefix_bytes_saved")
        assert kept == pytest.approx(computed, rel=1e-3, abs=1e-4)
    assert reports["rollout"] != reports["scoring"]  # it did come from elsewhere


def test_what_the_prefix_saves_by_hand():
    """Blocks run by the trunk with and without it differ by what is reported."""
    config = settings(max_steps=1, lora_last_k=1, batched_score="no")
    counted = {}
    for share in (True, False):
        models = method_from_model("hydra-ppo", plain_model(), lora=config)
        calls = []
        models.actor.trunk.layers[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        shared = settings(max_steps=1, lora_last_k=1, batched_score="no", share_prefix=share)
        shared.rollout_engine = "transformers"
        # Scoring and updates see whole sequences; a step of generation sees one token.
        models.actor.trunk.layers[0].register_forward_pre_hook(
            lambda _, args, calls=calls: calls.append(0) if args[0].shape[1] == 1 else None
        )
        metrics = run(shared, models).metrics[0]
        counted[share] = len(calls) - 2 * calls.count(0), metrics
    # Two minibatches an epoch are half a batch each: their passes count half.
    metrics = counted[True][1]
    rows, layer = 8, models.actor.trunk.layers[0]
    weights = sum(p.numel() for p in layer.parameters())
    # Scored by three passes; two epochs of two roles; one of them made it.
    assert metrics["reuse/prefix_bytes_saved"] == (3 + 2 * 2 - 1) * 4 * weights
    length = metrics["reuse/prefix_bytes_held"] / (4 * rows * 32)
    matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    flops = rows * length * (2 * matrices + 4 * length * 32)
    assert metrics["reuse/prefix_flops_saved"] == 6 * flops
    # The same in calls of block 0: 3 + 2 * 2 * 2 of halves without, 1 with.
    assert counted[False][0] - counted[True][0] == 3 + 8 - 1


@pytest.mark.parametrize(
    "changes",
    [
        {"batched_score": "yes"},
        {"reuse_reference_reward": False},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "use_reentrant": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"local_rollout_forward_batch_size": 3},
        {"rollout_logprobs": "reuse"},
        {"rollout_logprobs": "check"},
    ],
    ids=lambda changes: "-".join(map(str, itertools.chain(*changes.items()))),
)
@pytest.mark.parametrize("method", ONE_MODEL)
def test_ways_to_save_change_nothing(method, changes):
    """One step's metrics, and the adapters after it, are those of the plain way."""
    plain = run(settings(method=method, max_steps=1, batched_score="no"))
    other = run(settings(**{"method": method, "max_steps": 1, "batched_score": "no", **changes}))
    skip = ("objective/entropy", "val/rollout_logprob_diff")
    for name, value in numbers(plain)[0].items():
        if name not in skip:
            assert math.isclose(numbers(other)[0][name], value, rel_tol=2e-3, abs_tol=2e-5), name
    theirs = dict(other.models.actor.named_parameters())
    for name, parameter in plain.models.actor.named_parameters():
        torch.testing.assert_close(theirs[name], parameter, atol=5e-4, rtol=1e-3, msg=name)


def test_exact_kl_of_two_models_and_of_one():
    """The chunked KL over two heads is the fused one over one head."""
    inputs = batch()
    one = make_model("llama", trained=True)
    alone = MethodModels("hydra-ppo", one, one, one, one)
    other = plain_model(num_hidden_layers=3)
    other.causal_lm.load_state_dict(make_lm("llama").state_dict())
    two = MethodModels("lora-ppo", one, one, other, one)
    with torch.no_grad():
        expected = alone.score(*inputs, kl=True, temperature=0.7).kl
        found = two.score(*inputs, kl=True, temperature=0.7).kl
    assert expected.max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    assert run(settings(method="ppo", kl_estimator="exact", max_steps=1)).metrics


def test_critic_warmup_moves_no_policy():
    for method in METHODS:
        config = settings(method=method, max_steps=2, critic_warmup_steps=2)
        result = run(config)
        models = result.models
        with torch.no_grad():
            out = models.score(*batch())
        assert torch.equal(out.logprobs, out.ref_logprobs), method
        moved = (models.critic.value_head.weight - models.critic.reward_head.weight).abs().max()
        assert moved > 0, method
        assert "loss/policy_avg" not in result.metrics[0]
        assert result.metrics[0]["loss/value_avg"] > 0


def test_detached_values_leave_the_joint_adapter_to_the_policy():
    """However much the value loss weighs, a rollout's updates of the policy are the same, bit for
    bit; later rollouts meet other values."""
    after = {}
    for detach, weight in itertools.product((True, False), (0.1, 5.0)):
        config = settings(method="j-hydra-ppo", max_steps=1, detach_values=detach, vf_coef=weight)
        models = run(config, plain_model()).models
        joint = torch.cat([p.detach().flatten() for p in models.actor_parameters()])
        after[detach, weight] = joint, models.critic.value_head.weight.detach()
    assert torch.equal(after[True, 0.1][0], after[True, 5.0][0])
    assert not torch.equal(after[False, 0.1][0], after[False, 5.0][0])
    assert not torch.equal(after[True, 0.1][1], plain_model().reward_head.weight)


def test_detached_values_are_for_a_joint_adapter():
    with pytest.raises(UserError, match="detach_values is for j-hydra-ppo"):
        run(settings(method="hydra-ppo", detach_values=True))


def test_target_kl_stops_a_rollouts_updates():
    free = run(settings(max_steps=1, num_ppo_epochs=4))
    held = run(settings(max_steps=1, num_ppo_epochs=4, target_kl=1e-6))
    assert free.metrics[0]["policy/updates_skipped"] == 0
    # The first minibatch is at ratio 1; the second sees its step and stops.
    assert held.metrics[0]["policy/updates_skipped"] == 7
    assert held.metrics[0]["lr"] < held.metrics[0]["lr/critic"] * 1.01


def test_adaptive_kl_controller_moves_the_coefficient():
    config = settings(kl_controller="adaptive", kl_target=1e-3, kl_horizon=10.0, max_steps=4)
    coefficients = [m["objective/kl_coef"] for m in run(config).metrics]
    assert coefficients[0] == config.kl_coef
    # At KL 0 it falls by the most it may, 0.2 * 8 / 10.
    assert math.isclose(coefficients[1], config.kl_coef * (1 - 0.2 * 8 / 10))
    assert coefficients[-1] > coefficients[1], "KL above its target raises it"


def test_reward_function_gets_texts_and_columns():
    from hydra_rlhf.data import Prompt

    seen = []

    def reward(prompts, completions, answer, **rest):
        seen.append((prompts, completions, answer, rest))
        return [0.0] * len(prompts)

    rows = [Prompt(p, extra={"answer": i, "note": "n"}) for i, p in enumerate(PROMPTS)]
    run(settings(max_steps=1), reward_fn=reward, prompts=rows)
    prompts, completions, answer, rest = seen[0]
    assert len(prompts) == len(completions) == len(answer) == 8
    assert all(PROMPTS[i] == prompt for i, prompt in zip(answer, prompts, strict=True))
    assert rest == {"note": ["n"] * 8}
    assert all("<eos>" not in c for c in completions)

    def narrow(prompts, completions):
        return [1.0] * len(prompts)

    assert run(settings(max_steps=1), reward_fn=narrow, prompts=rows).metrics


def test_columns_that_only_some_rows_have():
    """A reward function gets each of them, with None where a row has none: whichever is first."""
    from hydra_rlhf.data import Prompt

    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts)
        return [0.0] * len(prompts)

    names = ("even", "odd")
    rows = [Prompt(p, extra={names[i % 2]: i}) for i, p in enumerate(PROMPTS)]
    run(settings(max_steps=1), reward_fn=reward, prompts=rows)
    numbers = [PROMPTS.index(prompt) for prompt in seen.pop("prompts")]
    assert seen == {
        "even": [None if i % 2 else i for i in numbers],
        "odd": [i if i % 2 else None for i in numbers],
    }


def test_a_reward_function_runs_in_its_own_precision():
    """A reward model in it is not rounded to that of the policy's passes, nor in evaluation."""
    seen = []

    def reward(prompts, completions):
        seen.append(torch.is_autocast_enabled("cpu"))
        third = torch.ones(1, 3) @ torch.full((3, 1), 1.0 / 3.0)
        seen.append(third.dtype is not torch.float32)
        return (float(third) for _ in prompts)

    changes = dict(max_steps=1, mixed_precision="bf16", eval_steps=1)
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate has one setting a process
    try:
        run(settings(**changes), reward_fn=reward, eval_prompts=PROMPTS[:2])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert seen == [False] * 6  # the rollout's, the policy's and the reference's


def test_missing_eos_rules():
    """Each rule applies to the responses that ran out, and to no other."""

    def one(prompts, completions):
        return [1.0] * len(prompts)

    base = settings(
        max_steps=1,
        response_length=1,
        kl_coef=0.0,
        method="ppo",
        per_device_train_batch_size=32,
    )
    for changes, expected in (
        ({"missing_eos_penalty": 3.0}, -2.0),
        ({"missing_eos_score": -1.0}, -1.0),
    ):
        config = PPOConfig(**{**vars(base), **changes})
        metrics = run(config, plain_model(vocab_size=4), one, ["w2 w3"]).metrics[0]
        ended = metrics["val/num_eos_tokens"]
        mean = (ended * 1.0 + (64 - ended) * expected) / 64
        assert math.isclose(metrics["objective/rlhf_reward"], mean, abs_tol=1e-6)
        assert 0 < ended < 64


def test_evaluation_leaves_training_alone():
    plain = run(settings(max_steps=3))
    held_out = run(
        settings(max_steps=3, eval_steps=2, num_eval_prompts=5), eval_prompts=PROMPTS[:7]
    )
    evaluated = numbers(held_out)
    assert "eval/win_rate" in evaluated[1] and "eval/win_rate" not in evaluated[0]
    assert 0.0 <= evaluated[1]["eval/win_rate"] <= 1.0
    trained = [{k: v for k, v in m.items() if not k.startswith("eval/")} for m in evaluated]
    assert trained == numbers(plain)


def test_tracker_and_on_step_see_every_step():
    logged, steps = [], []

    class Log:
        def log(self, metrics, step):
            logged.append((step, metrics["objective/kl"]))

    run(settings(), tracker=Log(), on_step=lambda step, metrics: steps.append(step))
    assert steps == [1, 2]
    assert [step for step, _ in logged] == [1, 2]


def test_metrics_are_trls():
    metrics = run(settings(max_steps=1)).metrics[0]
    trl = (
        "objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward "
        "objective/scores policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg "
        "val/clipfrac_avg policy/entropy_avg val/ratio val/ratio_var val/num_eos_tokens lr episode"
    )
    assert set(trl.split()) <= metrics.keys()
    assert {"time/rollout", "time/score", "time/update", "memory/update_peak"} <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())


def test_diagnostics_name_the_cause():
    good = run(settings(max_steps=1)).metrics[0] | {"val/num_eos_tokens": 3.0}
    assert diagnose(settings(), good) == []
    cases = [
        ({"top_p": 0.9}, {"objective/kl": -0.5}, "top_p is 0.9"),
        ({}, {"objective/kl": -5.0}, "far below 0"),
        ({}, {"val/ratio_max": 11.0}, "passed 10"),
        ({}, {"val/ratio_first": 1.5}, "starts at ratio 1.5"),
        ({}, {"val/ratio_first": 0.5}, "starts at ratio 0.5"),
        ({}, {"val/rollout_logprob_diff": 0.1}, "differ by 0.1"),
        ({}, {"val/num_eos_tokens": 0.0}, "no response ended"),
    ]
    for changes, figures, message in cases:
        found = diagnose(settings(**changes), good | figures)
        assert len(found) == 1 and message in found[0], figures


def test_what_was_sampled_is_compared_with_what_is_scored(monkeypatch):
    """Without being asked, where it costs nothing and no filter makes them differ."""
    plain = run(settings(max_steps=1))
    assert plain.metrics[0]["val/rollout_logprob_diff"] < 1e-5
    assert "val/rollout_logprob_diff" not in run(settings(max_steps=1, top_p=0.9)).metrics[0]

    as_rollout = engine.as_rollout

    def of_another_policy(*args):
        rollout = as_rollout(*args)
        rollout.logprobs = rollout.logprobs - 0.3 * rollout.response_mask
        return rollout

    monkeypatch.setattr(engine, "as_rollout", of_another_policy)
    found = run(settings(max_steps=1)).diagnostics
    assert any("log-probabilities differ by 0.3" in message for message in found)


def test_explained_variance_by_hand():
    returns = torch.tensor([[1.0, 2.0, 3.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert float(explained_variance(returns, returns, mask)) == 1.0
    # Errors 0, 1, 0: variance 2/9, over 2/3.
    values = torch.tensor([[1.0, 1.0, 3.0, 0.0]])
    assert float(explained_variance(values, returns, mask)) == pytest.approx(2 / 3)
    assert float(explained_variance(values, torch.ones(1, 4), mask)) == 0.0

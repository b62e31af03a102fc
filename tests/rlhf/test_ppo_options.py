"""PPO's options over whole steps: each against numbers by hand or against the plain run."""

import math
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hydra_rlhf import ppo
from hydra_rlhf import trunk as trunks
from hydra_rlhf import update as updates
from hydra_rlhf.errors import UserError
from hydra_rlhf.experience import check_rollout_logprobs, make_experience
from hydra_rlhf.methods import build_method, lora_config_of, method_from_model
from hydra_rlhf.model import HydraModel, Score
from hydra_rlhf.processes import Processes
from hydra_rlhf.rollout import Rollout
from tests.rlhf.families import THREE, batch, make_model, train_by_chance
from tests.rlhf.test_ppo import numbers, plain_model, run, settings, word_reward

SEPARATE = ("ppo", "lora-ppo", "d-lora-ppo")


def experience_of(**changes):
    """Advantages and returns of two responses of three and two tokens, all values 0."""
    config = settings(gamma=1.0, lam=1.0, whiten_advantages=False, **changes)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rollout = Rollout(torch.zeros(2, 5), torch.ones(2, 5), mask, torch.ones(2))
    gap = torch.tensor([[0.5, -1.0, 0.25], [2.0, 0.0, 9.0]])  # the last is padding
    scored = Score(
        logprobs=torch.where(mask, gap - 1.0, 0.0),
        ref_logprobs=torch.where(mask, torch.tensor(-1.0), 0.0),
        entropy=torch.ones(2, 3),
        values=torch.zeros(2, 3),
        scores=torch.tensor([1.0, -2.0]),
    )
    processes = Processes(Accelerator(cpu=True))
    made, _ = make_experience(config, rollout, scored, scored.scores, 0.1, {}, processes)
    return made


K3 = [[math.exp(-d) - 1 + d for d in row] for row in ([0.5, -1.0, 0.25], [2.0, 0.0])]


@pytest.mark.parametrize(
    ("estimator", "kl"),
    [
        ("k1", [[0.5, -1.0, 0.25], [2.0, 0.0]]),
        ("k2", [[0.125, 0.5, 0.03125], [2.0, 0.0]]),
        ("k3", K3),
    ],
)
def test_kl_estimators_by_hand(estimator, kl):
    """With gamma = lambda = 1 a return is the sum of the rewards from its token on."""
    (a, b, c), (d, e) = ([-0.1 * value for value in row] for row in kl)
    c, e = c + 1.0, e - 2.0
    expected = torch.tensor([[a + b + c, b + c, c], [d + e, e, 0.0]])
    torch.testing.assert_close(experience_of(kl_estimator=estimator).returns, expected)


def test_whiten_rewards_by_hand():
    """Rewards are divided by their standard deviation and keep their mean."""
    rewards = torch.tensor([-0.05, 0.1, 0.975, -0.2, -2.0])
    whitened = (rewards - rewards.mean()) / rewards.std() + rewards.mean()
    a, b, c, d, e = whitened.tolist()
    expected = torch.tensor([[a + b + c, b + c, c], [d + e, e, 0.0]])
    found = experience_of(whiten_rewards=True).returns
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"kl_estimator": "k2"}, {"kl_estimator": "k3"}, {"whiten_rewards": True}]
)
def test_rewards_options_reach_the_loop(changes):
    """The first rollout is the same, what is learnt from it is not."""
    plain, other = (
        run(settings(kl_coef=0.5, max_steps=3, **c), reward_fn=word_reward) for c in ({}, changes)
    )
    first, last = numbers(plain), numbers(other)
    assert first[0]["objective/scores"] == last[0]["objective/scores"]
    assert first[-1]["loss/value_avg"] != last[-1]["loss/value_avg"]
    assert all(math.isfinite(value) for value in last[-1].values())


@pytest.mark.parametrize("method", ["ppo", "j-hydra-ppo"])
def test_entropy_bonus_raises_entropy(method):
    """Without reward or KL the bonus is all that moves the policy."""

    def entropies(coefficient):
        model = plain_model(vocab_size=16)
        with torch.no_grad():
            model.causal_lm.get_output_embeddings().weight.mul_(10.0)  # a peaked policy
        config = settings(
            method=method,
            ent_coef=coefficient,
            kl_coef=0.0,
            vf_coef=0.0,
            whiten_advantages=False,
            max_steps=4,
            num_mini_batches=1,
            temperature=1.0,
            learning_rate=1e-2 if method != "ppo" else 2e-3,
            lr_scheduler_type="constant",
        )
        nothing = lambda prompts, completions: [0.0] * len(prompts)  # noqa: E731
        metrics = run(config, model, nothing, ["w2 w3", "w3", "w3 w2 w2"]).metrics
        return [m["policy/entropy_avg"] for m in metrics]

    with_bonus, without = entropies(1.0), entropies(0.0)
    assert with_bonus[-1] > 1.2 * without[-1]


@pytest.mark.parametrize("method", ["lora-ppo", "j-hydra-ppo", "hydra-ppo"])
def test_bfloat16_autocast(method):
    """Ratio 1 before the first update; both sets learn, close to what float32 learns."""
    changes = dict(method=method, num_mini_batches=1, max_steps=2, learning_rate=1e-3)
    plain = run(settings(**changes))
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate has one setting a process
    try:
        mixed = run(settings(**changes, mixed_precision="bf16"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    first = mixed.metrics[0]
    assert first["val/ratio_first"] == 1.0 and first["objective/kl"] == 0.0
    assert first["objective/scores"] != plain.metrics[0]["objective/scores"], "it was float32"
    for m in mixed.metrics:
        assert all(math.isfinite(value) for value in m.values())
    for trained in ("actor_parameters", "critic_parameters"):
        before = getattr(method_from_model(method, plain_model(), lora=settings()), trained)()
        after = getattr(mixed.models, trained)()
        assert all(p.dtype == torch.float32 for p in after)
        assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)), trained


@pytest.fixture
def two_models(tmp_path):
    """Folders of an SFT model and of a reward model with another trunk."""
    sft, reward = plain_model(), plain_model(num_hidden_layers=3)
    sft.save_pretrained(tmp_path / "sft")
    reward.save_pretrained(tmp_path / "reward")
    return tmp_path / "sft", tmp_path / "reward"


@pytest.mark.parametrize("method", SEPARATE)
def test_separate_sft_and_reward_models(method, two_models):
    """Policies come from one, values and scores from the other, before and after training."""
    models = build_method(method, *two_models, lora=settings())
    inputs = batch()
    sft, reward = (HydraModel.from_pretrained(path) for path in two_models)
    with torch.no_grad():
        policy = sft.score(*inputs, roles=("reference",))
        value = reward.score(*inputs, roles=("critic", "reward"))
        found = models.score(*inputs)
    assert torch.equal(found.logprobs, policy.ref_logprobs)
    assert torch.equal(found.ref_logprobs, policy.ref_logprobs)
    assert torch.equal(found.values, value.values) and torch.equal(found.scores, value.scores)
    result = run(settings(method=method, max_steps=2), models)
    with torch.no_grad():
        after = result.models.score(*inputs)
    assert torch.equal(after.ref_logprobs, policy.ref_logprobs)
    assert torch.equal(after.scores, value.scores)
    assert not torch.equal(after.logprobs, found.logprobs)
    assert not torch.equal(after.values, found.values)


@pytest.mark.parametrize("method", ["d-lora-ppo", "j-hydra-ppo", "hydra-ppo"])
def test_reference_adapter_for_a_whole_run(method, tmp_path):
    """The actor starts from a frozen SFT adapter, which stays the reference."""
    sft = plain_model()
    sft.save_pretrained(tmp_path / "sft")
    with_sft = HydraModel.from_pretrained(
        tmp_path / "sft", adapters=("actor",), lora_config=lora_config_of(settings(), sft.causal_lm)
    )
    train_by_chance(with_sft)
    with_sft.save_adapters(tmp_path)
    inputs = batch()
    with torch.no_grad():
        expected = with_sft.score(*inputs, roles=("actor", "reward"))
        base = with_sft.score(*inputs, roles=("reference",))
    models = build_method(
        method,
        tmp_path / "sft",
        lora=settings(),
        reference_adapter=str(tmp_path / "actor"),
    )
    result = run(settings(method=method, max_steps=2), models)
    first = result.metrics[0]
    assert first["objective/kl"] == 0.0
    # Adapters that are not zero are scored in one batch and updated in another: rounding.
    assert first["val/ratio_first"] == pytest.approx(1.0, abs=1e-6)
    with torch.no_grad():
        after = result.models.score(*inputs)
    torch.testing.assert_close(after.ref_logprobs, expected.logprobs)
    assert not torch.allclose(after.ref_logprobs, base.ref_logprobs, atol=1e-3)
    assert torch.equal(after.scores, expected.scores)
    assert not torch.equal(after.logprobs, after.ref_logprobs), "the actor did not move"


@pytest.mark.parametrize("method", ["lora-ppo", "j-hydra-ppo", "hydra-ppo", "ppo"])
def test_gradients_lie_in_one_piece(monkeypatch, method):
    """On a CPU, of adapters; whether they do or not, and while the critic warms up, every number
    is the same, bit for bit."""
    places = []
    real = updates.clip_gradients

    def seen(config, optimizer, accelerator):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    places.append(parameter.grad.untyped_storage().data_ptr())
        return real(config, optimizer, accelerator)

    monkeypatch.setattr(updates, "clip_gradients", seen)
    config = settings(method=method, critic_warmup_steps=1, max_steps=2)
    together = run(replace(config), plain_model())
    assert (len(set(places)) <= config.max_steps) == (method != "ppo")
    monkeypatch.setattr(updates, "room_for_gradients", lambda *_: [])
    places.clear()
    apart = run(replace(config), plain_model())
    assert len(set(places)) > config.max_steps
    assert numbers(together) == numbers(apart)
    for a, b in zip(together.models, apart.models, strict=True):
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(x, y)


def test_rollout_and_scoring_have_to_agree_on_every_token():
    """One token of many that is off, above or below, or that is no number."""
    mask = torch.ones(4, 100, dtype=torch.bool)
    scored = Score(logprobs=torch.full((4, 100), -1.0))
    for off in (2e-4, -2e-4, math.nan):
        sampled = scored.logprobs.clone()
        sampled[2, 50] += off
        rollout = Rollout(mask, mask, mask, mask[:, 0], sampled)
        with pytest.raises(RuntimeError, match=r"log-probabilities differ by (0.0002|nan) nats"):
            check_rollout_logprobs(rollout, scored, 1e-4)
        if off == off:
            check_rollout_logprobs(rollout, scored, 3e-4)


def test_a_prompt_leaves_room_for_its_response():
    """In a context of 64 tokens and with 5 of response: whatever max_prompt_length allows."""
    for longest in (None, 1000):
        config = settings(max_steps=1, max_prompt_length=longest, num_mini_batches=1)
        with pytest.raises(UserError, match="prompt 1 has 60 tokens, more than 59"):
            run(config, prompts=[" ".join(["w3"] * 60)])
        assert run(config, prompts=[" ".join(["w3"] * 59)]).metrics


def test_every_response_of_a_run_has_a_seed_of_its_own(monkeypatch):
    seeds = []
    real = ppo.sample

    def sample(config, model, tokenizer, rows, sampler, given):
        seeds.extend(given)
        return real(config, model, tokenizer, rows, sampler, given)

    monkeypatch.setattr(ppo, "sample", sample)
    run(settings(max_steps=2))
    assert len(set(seeds)) == len(seeds) == 16


def test_a_reward_function_spares_the_reward_model():
    models = method_from_model("lora-ppo", plain_model(), lora=settings())
    passes = []
    models.reward.trunk.register_forward_hook(lambda *_: passes.append(1))
    run(settings(method="lora-ppo", max_steps=1), models, word_reward)
    assert not passes
    run(settings(method="lora-ppo", max_steps=1), models)
    assert len(passes) == 1


@pytest.mark.parametrize("family", THREE)
def test_compiles(family):
    """A pass with its gradients, forward and backward through the ops' fake kernels, is eager's
    for every role, and new ids, of a batch or of each row, do not recompile."""
    model = make_model(family, trained=True, layers_to_transform=[0])
    blocks = trunks.blocks(model.trunk)
    del blocks[1:]
    model.config.num_hidden_layers = 1
    ids, mask, response_mask = batch(padded=False)
    T = response_mask.shape[1]

    def of_pass(adapters):
        states = model.hidden(ids, mask, adapter_ids=adapters)[:, -T - 1 : -1]
        out = model.lm_head.logprob(states, ids[:, -T:])
        return out.logprobs, out.entropy, model._head("value", states)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(of_pass, backend=counter)
    trained = [p for a in model.adapters for p in model.adapter_parameters(a)]
    names = ("actor", "critic", "reference", "actor")
    mixed = torch.tensor([model.adapter_id(role) for role in names])
    frames = []
    for adapters in (*(mixed[i].expand(len(ids)).clone() for i in range(3)), mixed):
        found = []
        for function in (compiled, of_pass):
            out = function(adapters)
            loss = sum((part * part.detach().cos()).sum() for part in out)
            gradients = torch.autograd.grad(loss, trained)
            found.append((*(part.detach() for part in out), *gradients))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
        half = len(trained) // 2
        touched = {"actor": found[0][3:][:half], "critic": found[0][3:][half:]}
        for role, part in touched.items():
            expected = bool((adapters == model.adapter_id(role)).any())
            assert any(bool(g.any()) for g in part) == expected
        frames.append(counter.frame_count)
    assert frames[0] >= 1 and len(set(frames)) == 1


@pytest.mark.parametrize(
    ("method", "passes"),
    [("lora-ppo", 1), ("d-lora-ppo", 2), ("j-hydra-ppo", 2), ("hydra-ppo", 3)],
)
def test_scores_in_one_batch_while_its_bytes_fit(monkeypatch, method, passes):
    """By hand: passes x sequences x tokens x (2 D + 3 I) float32 numbers."""
    # Eight words at most and five of response; D = 32, I = 48.
    config = settings(method=method, max_steps=1, keep_scoring_pass=False)
    widths = []
    real = HydraModel.hidden

    def seen(self, input_ids, *args, **kwargs):
        widths.append(tuple(input_ids.shape))
        return real(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(HydraModel, "hidden", seen)
    run(config)
    rows, length = config.local_batch_size, widths[0][1]
    assert widths[0] == (passes * rows, length), "the default budget is far away"
    needed = passes * rows * length * (2 * 32 + 3 * 48) * 4
    for budget, batched in ((needed, passes), (needed - 1, 1)):
        widths.clear()
        run(replace(config, batched_score_budget_gb=budget / 1e9))
        assert widths[0] == (batched * rows, length)


def test_what_the_prefix_saves_of_an_update_that_stopped_early():
    """Blocks run without it and with it: the minibatch that told to stop was run as well."""
    counted = []
    for share in (True, False):
        config = settings(max_steps=1, lora_last_k=1, batched_score="no", share_prefix=share)
        config.num_ppo_epochs, config.target_kl = 4, 1e-6
        config.rollout_engine = "transformers"
        models = method_from_model("hydra-ppo", plain_model(), lora=config)
        calls, layer = [], models.actor.trunk.layers[0]
        layer.register_forward_hook(lambda _, args, out, calls=calls: calls.append(args[0].shape))
        metrics = run(config, models).metrics[0]
        assert metrics["policy/updates_skipped"] == 7  # of 8: the second is told, and run
        length = max(shape[1] for shape in calls)
        counted.append(sum(shape[0] for shape in calls if shape[1] == length))
        if share:
            saved = metrics["reuse/prefix_bytes_saved"] / sum(p.nbytes for p in layer.parameters())
    # Of 8 rows: three passes of scoring, one of which made it, and one epoch of two roles.
    assert saved == (counted[1] - counted[0]) / 8 == 3 - 1 + 2

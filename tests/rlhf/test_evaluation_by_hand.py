"""What evaluations report against logits and loops, over the responses that they sampled."""

import pytest
import torch
from accelerate import Accelerator

from hydra_rlhf import evaluate, ppo
from hydra_rlhf import rollout as rollouts
from hydra_rlhf.data import Prompt
from hydra_rlhf.errors import UserError
from hydra_rlhf.experience import Sampler
from hydra_rlhf.methods import method_from_model
from hydra_rlhf.model import HydraModel
from hydra_rlhf.processes import Processes
from tests.rlhf.families import PROMPTS, make_model, make_tokenizer, train_by_chance
from tests.rlhf.test_ppo import plain_model, run, settings


def logprobs(model, role, rollout, temperature):
    """(B, T), 0 where masked."""
    T = rollout.response_mask.shape[1]
    ids = rollout.query_responses
    logits = model.forward_role(role, ids, rollout.attention_mask)[:, -T - 1 : -1]
    every = torch.log_softmax(logits / temperature, -1).gather(-1, ids[:, -T:, None])
    return every.squeeze(-1) * rollout.response_mask


def rewards(model, rollout):
    every = model.forward_role("reward", rollout.query_responses, rollout.attention_mask)
    last = [int(seen.nonzero().max()) for seen in rollout.attention_mask]
    return every[torch.arange(len(last)), last].tolist()


@pytest.mark.parametrize("by", ["reward head", "function"])
def test_what_ppo_reports_of_held_out_prompts(by, monkeypatch):
    """Both policies answer from the same seeds; a tie is half a win; the KL is the actor's."""
    config = settings(temperature=0.7, response_length=4, local_rollout_forward_batch_size=3)
    models = method_from_model("hydra-ppo", plain_model(vocab_size=6), lora=config)
    train_by_chance(models.actor, scale=0.5)
    processes = Processes(Accelerator(cpu=True))
    sampler = Sampler(config, rollouts.sampling_of(config, make_tokenizer()), processes)
    found = {"actor": [], "reference": []}
    real = ppo.sample

    def sample(config, model, tokenizer, rows, sampler, seeds, *, role):
        rollout = real(config, model, tokenizer, rows, sampler, seeds, role=role)
        found[role].append((rows, seeds, rollout))
        return rollout

    monkeypatch.setattr(ppo, "sample", sample)

    def words(prompts, completions):
        return [float(len(completion.split())) for completion in completions]

    prompts = ["w2", "w3 w4", "w5 w2 w3", "w4", "w3"]
    reward_fn = words if by == "function" else None
    before = torch.get_rng_state()
    arguments = config, models, make_tokenizer(), prompts, sampler, reward_fn, processes
    metrics = ppo.evaluate(*arguments)
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(rollout) for _, _, rollout in found["actor"]] == [3, 2]
    scores, kl = {"actor": [], "reference": []}, []
    with torch.no_grad():
        for role, parts in found.items():
            for rows, _, rollout in parts:
                if by == "function":
                    scores[role] += words(rows, rollout.responses)
                else:
                    scores[role] += rewards(models.actor, rollout)
                drawn = logprobs(models.actor, role, rollout, 0.7)
                if role == "actor":
                    gap = drawn - logprobs(models.actor, "reference", rollout, 0.7)
                    kl += gap.sum(1).tolist()
    pairs = list(zip(scores["actor"], scores["reference"], strict=True))
    won = sum(a > b for a, b in pairs) + sum(a == b for a, b in pairs) / 2
    assert any(a != b for a, b in pairs) and (by != "function" or any(a == b for a, b in pairs))
    assert metrics == pytest.approx(
        {
            "eval/objective/scores": sum(scores["actor"]) / 5,
            "eval/objective/reference_scores": sum(scores["reference"]) / 5,
            "eval/objective/kl": sum(kl) / 5,
            "eval/win_rate": won / 5,
        },
        rel=1e-4,
    )
    assert abs(sum(kl)) > 0.1
    seeds = {role: sum((list(part[1]) for part in parts), []) for role, parts in found.items()}
    assert seeds["actor"] == seeds["reference"] and len(set(seeds["actor"])) == 5
    again = [rollout.query_responses for _, _, rollout in found["actor"]]
    assert ppo.evaluate(*arguments) == metrics
    for one, other in zip(again, found["actor"][2:], strict=True):
        assert torch.equal(one, other[2].query_responses)


@pytest.mark.parametrize("engine", ["transformers", "hydra"])
def test_held_out_answers_do_not_hang_on_what_was_drawn_before(engine):
    """Also of an engine that has no seeds and draws from torch's generator."""
    config = settings(rollout_engine=engine, response_length=4)
    models = method_from_model("hydra-ppo", plain_model(), lora=config)
    train_by_chance(models.actor, scale=0.5)
    processes = Processes(Accelerator(cpu=True))
    sampler = Sampler(config, rollouts.sampling_of(config, make_tokenizer()), processes)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        arguments = config, models, make_tokenizer(), PROMPTS[:4], sampler, None, processes
        found.append(ppo.evaluate(*arguments))
    assert found[0] == found[1]
    config.seed += 1
    assert ppo.evaluate(*arguments) != found[0]


def test_how_many_held_out_prompts_and_when():
    """The first three of seven, at every second step; functions see training prompts between."""
    seen = []

    def reward(prompts, completions):
        seen.append(prompts)
        return [0.0] * len(prompts)

    held_out = PROMPTS[:7]
    config = settings(max_steps=3, eval_steps=2, num_eval_prompts=3, num_ppo_epochs=1)
    result = run(config, reward_fn=reward, eval_prompts=held_out)
    assert [len(prompts) for prompts in seen] == [8, 8, 3, 3, 8]
    assert seen[2] == seen[3] == held_out[:3]
    assert ["eval/win_rate" in m for m in result.metrics] == [False, True, False]
    assert result.metrics[1]["eval/win_rate"] == 0.5


@pytest.mark.parametrize("judged_by", ["the baseline's head", "another model", "nobody"])
def test_answers_and_their_figures(judged_by, monkeypatch):
    model = make_model("llama", trained=True)
    train_by_chance(model, scale=0.4)
    baseline = make_model("llama", (), seed=3)
    other = make_model("llama", (), seed=5)
    if judged_by == "nobody":
        torch.nn.init.zeros_(baseline.reward_head.weight)
    prompts = [Prompt(text) for text in PROMPTS[:5]]
    sampling = rollouts.sampling_of(settings(temperature=0.6), make_tokenizer())
    made = []
    real = rollouts.generate

    def generate(*args, **kwargs):
        made.append(real(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(rollouts, "generate", generate)
    torch.manual_seed(11)
    expected_draw = torch.rand(())
    torch.manual_seed(11)
    kwargs = dict(baseline=baseline, role="actor", seed=4, batch_size=3)
    if judged_by == "another model":
        kwargs["reward_model"] = other
    done = []
    arguments = "A", model, make_tokenizer(), prompts, sampling
    found = evaluate.answer(*arguments, **kwargs, on_batch=done.append)
    assert done == [3, 5]
    assert torch.equal(torch.rand(()), expected_draw), "the global generator is left alone"
    kl, nll, scores = [], [], []
    with torch.no_grad():
        for rollout in made:
            ours = logprobs(model, "actor", rollout, 0.6).sum(1)
            theirs = logprobs(baseline, "reference", rollout, 0.6).sum(1)
            kl += (ours - theirs).tolist()
            nll += (-theirs).tolist()
            scores += rewards(other if judged_by == "another model" else baseline, rollout)
    assert found.kl == pytest.approx(kl, rel=1e-4, abs=1e-4)
    assert found.nll == pytest.approx(nll, rel=1e-4, abs=1e-4)
    if judged_by == "nobody":
        assert found.rewards is None
    else:
        assert found.rewards == pytest.approx(scores, rel=1e-4, abs=1e-5)
    assert found.tokens == [int(row.sum()) for r in made for row in r.response_mask]
    assert found.ended == [bool(one) for r in made for one in r.ended]
    assert evaluate.answer(*arguments, **kwargs).responses == found.responses
    kwargs["seed"] = 5
    assert evaluate.answer(*arguments, **kwargs).responses != found.responses
    report = evaluate.judge_answers(
        prompts,
        [found, found],
        evaluate.ScoreJudge("length", lambda prompts, completions: map(len, completions)),
    ).policies[1]
    per_token = torch.tensor(sum(nll) / sum(found.tokens))
    assert report.perplexity == pytest.approx(float(per_token.exp()), rel=1e-3)
    assert report.kl.mean == pytest.approx(sum(kl) / 5, rel=1e-3, abs=1e-3)
    assert report.length == sum(found.tokens) / 5 and report.ended == sum(found.ended) / 5


def test_a_baseline_is_compared_with_itself_for_nothing():
    baseline = HydraModel(make_model("llama", ()).causal_lm)
    sampling = rollouts.sampling_of(settings(), make_tokenizer())
    prompts = [Prompt(text) for text in PROMPTS[:2]]
    found = evaluate.answer(
        "base", baseline, make_tokenizer(), prompts, sampling, baseline=baseline
    )
    assert found.kl == [0.0, 0.0] and min(found.nll) > 0 and found.rewards is None


def test_a_prompt_leaves_room_for_its_answer():
    """In a context of 64 tokens, with 5 of answer."""
    model = make_model("llama", ())
    sampling = rollouts.sampling_of(settings(response_length=5), make_tokenizer())
    with pytest.raises(UserError, match="prompt 1 has 60 tokens, more than 59"):
        evaluate.answer("A", model, make_tokenizer(), [Prompt("w3 " * 60)], sampling)
    assert evaluate.answer("A", model, make_tokenizer(), [Prompt("w3 " * 59)], sampling).tokens

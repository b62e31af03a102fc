"""Whole steps against PPO in plain PyTorch: logits held, loops over tokens, torch's AdamW.

Only the sampled tokens and the order of the minibatches are taken from the run. Settings are all
away from their defaults and from each other, so that none can stand in for another.
"""

import copy
import math

import pytest
import torch

from hydra_rlhf import ppo
from hydra_rlhf import update as updates
from hydra_rlhf.methods import method_from_model
from tests.rlhf.test_ppo import numbers, plain_model, run, settings

WORDS = ["w2 w3", "w3", "w3 w5 w2", "w7 w4 w6 w2 w5"]
COMMON = dict(
    per_device_train_batch_size=3,
    gradient_accumulation_steps=2,
    num_mini_batches=2,
    num_ppo_epochs=2,
    response_length=5,
    temperature=0.7,
    gamma=0.9,
    lam=0.7,
    kl_coef=0.3,
    cliprange=0.1,
    cliprange_value=0.04,
    vf_coef=0.6,
    learning_rate=2e-2,
    critic_learning_rate=1e-2,
    adam_beta1=0.8,
    adam_beta2=0.95,
    adam_epsilon=1e-3,
    weight_decay=0.1,
    max_grad_norm=0.3,
)
CASES = {
    "hydra-ppo": dict(
        kl_estimator="k3",
        kl_controller="adaptive",
        kl_target=0.5,
        kl_horizon=100.0,
        missing_eos_penalty=1.5,
        score_clip=0.6,
        whiten_rewards=True,
        ent_coef=0.05,
        lora_last_k=1,
        local_rollout_forward_batch_size=5,
    ),
    "j-hydra-ppo": dict(
        kl_estimator="exact",
        whiten_advantages=False,
        target_kl=0.035,
        vf_coef=0.2,
        lr_scheduler_type="cosine",
    ),
    "d-lora-ppo": dict(
        kl_estimator="k2",
        critic_warmup_steps=1,
        missing_eos_score=-2.0,
        use_score_scaling=True,
        use_score_norm=True,
        target_kl=100.0,
        lora_last_k=1,
    ),
    "ppo": dict(
        learning_rate=2e-3,
        critic_learning_rate=1e-3,
        max_grad_norm=None,
        rollout_logprobs="reuse",
    ),
}


class Plain:
    """Models of its own, and what a run keeps from one step to the next."""

    def __init__(self, config, models):
        self.config, self.models = config, models
        actor, critic = models.actor_parameters(), models.critic_parameters()
        self.groups = {"actor": actor, "critic": critic}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": actor, "lr": config.learning_rate},
                {"params": critic, "lr": config.critic_learning_rate},
            ],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.kl_coef = config.kl_coef
        self.scores = torch.zeros(0)
        self.updates = 0

    def policy(self, role, rollout, rows):
        """(log-probabilities over the vocabulary, those of the tokens)."""
        T = rollout.response_mask.shape[1]
        ids, mask = rollout.query_responses[rows], rollout.attention_mask[rows]
        logits = getattr(self.models, role).forward_role(role, ids, mask)[:, -T - 1 : -1]
        every = torch.log_softmax(logits / self.config.temperature, -1)
        return every, every.gather(-1, ids[:, -T:, None]).squeeze(-1)

    def values(self, rollout, rows):
        T = rollout.response_mask.shape[1]
        ids, mask = rollout.query_responses[rows], rollout.attention_mask[rows]
        return self.models.critic.forward_role("critic", ids, mask)[:, -T - 1 : -1]

    def shaped(self, scores, ended):
        config = self.config
        if config.missing_eos_penalty is not None:
            scores = scores - config.missing_eos_penalty * (~ended).float()
        if config.missing_eos_score is not None:
            scores = torch.tensor(
                [s if e else config.missing_eos_score for s, e in zip(scores, ended, strict=True)]
            )
        if config.use_score_scaling:
            self.scores = torch.cat([self.scores, scores])
            scores = (scores - self.scores.mean()) / self.scores.std()
        limit = math.inf if config.score_clip is None else config.score_clip
        return scores.clip(-limit, limit)

    def step(self, step, rollout, orders):
        """One rollout's experience and updates; the metrics that a run reports of them."""
        config, mask = self.config, rollout.response_mask
        B, T = mask.shape
        rows = torch.arange(B)
        with torch.no_grad():
            every, old = self.policy("actor", rollout, rows)
            every_ref, ref = self.policy("reference", rollout, rows)
            old_values = self.values(rollout, rows)
            ids, seen = rollout.query_responses, rollout.attention_mask
            last = [int(row.nonzero().max()) for row in seen]
            scores = self.models.reward.forward_role("reward", ids, seen)[rows, last]
        log_ratio = old - ref
        kl = {
            "k1": log_ratio,
            "k2": log_ratio**2 / 2,
            "k3": (-log_ratio).exp() - 1 + log_ratio,
            "exact": (every.exp() * (every - every_ref)).sum(-1),
        }
        shaped = self.shaped(scores, rollout.ended)
        rewards = torch.zeros(B, T)
        for b in range(B):
            for t in range(T):
                if mask[b, t]:
                    rewards[b, t] = -self.kl_coef * kl[config.kl_estimator][b, t]
            rewards[b, mask[b].sum() - 1] += shaped[b]
        given = rewards.sum(1)
        if config.whiten_rewards:
            mean, std = rewards[mask].mean(), rewards[mask].std()
            rewards = (rewards - mean) / std + mean
        advantages = torch.zeros(B, T)
        for b in range(B):
            following, value = 0.0, 0.0
            for t in reversed(range(int(mask[b].sum()))):
                delta = rewards[b, t] + config.gamma * value - old_values[b, t]
                following = delta + config.gamma * config.lam * following
                advantages[b, t], value = following, old_values[b, t]
        returns = advantages + old_values
        if config.whiten_advantages:
            advantages = (advantages - advantages[mask].mean()) / advantages[mask].std()
        measured = kl["exact" if config.kl_estimator == "exact" else "k1"]
        total_kl = torch.where(mask, measured, 0.0).sum(1).mean()
        errors = (returns - old_values)[mask]
        entropy = -(every.exp() * every).sum(-1)
        if config.rollout_logprobs == "reuse":
            entropy = -old  # whose expectation it is
        metrics = {
            "objective/kl": total_kl,
            "objective/kl_coef": self.kl_coef,
            "objective/entropy": entropy.mul(mask).sum(1).mean(),
            "objective/scores": scores.mean(),
            "objective/scores_std": scores.std(correction=0),
            "objective/non_score_reward": (given - shaped).mean(),
            "objective/rlhf_reward": given.mean(),
            "objective/response_length": mask.sum() / B,
            "tokens/response": mask.sum(),
            "val/num_eos_tokens": rollout.ended.sum(),
            "val/explained_variance": 1 - errors.var() / returns[mask].var(),
            "episode": B * step,
        }
        if config.kl_controller == "adaptive":
            error = min(max(float(total_kl) / config.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * B / config.kl_horizon
        arguments = step, rollout, old, old_values, advantages, returns, orders
        return metrics | self.update(*arguments)

    def update(self, step, rollout, old, old_values, advantages, returns, orders):
        config = self.config
        warmup = step <= config.critic_warmup_steps
        total = config.max_steps * config.num_ppo_epochs * config.num_mini_batches
        history, skipped, stopped = [], 0, False
        for rows in (rows for order in orders for rows in order):
            share = 1 - self.updates / total
            if config.lr_scheduler_type == "cosine":
                share = (1 + math.cos(math.pi * self.updates / total)) / 2
            self.updates += 1
            if stopped:
                skipped += 1
                continue
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * share
            kept = rollout.response_mask[rows]
            every, new = self.policy("actor", rollout, rows)
            ratio = (new - old[rows])[kept].exp()
            gain = advantages[rows][kept]
            clipped = ratio.clip(1 - config.cliprange, 1 + config.cliprange)
            policy_losses = torch.maximum(-gain * ratio, -gain * clipped)
            entropy = -(every.exp() * every).sum(-1)[kept].mean()
            value, before = self.values(rollout, rows)[kept], old_values[rows][kept]
            target, reach = returns[rows][kept], config.cliprange_value
            near = before + (value - before).clip(-reach, reach)
            value_losses = torch.maximum((value - target) ** 2, (near - target) ** 2) / 2
            loss = config.vf_coef * value_losses.mean()
            if not warmup:
                loss = loss + policy_losses.mean() - config.ent_coef * entropy
            self.optimizer.zero_grad()
            loss.backward()
            limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
            norms = [torch.nn.utils.clip_grad_norm_(group, limit) for group in self.groups.values()]
            approx_kl = (ratio - 1 - ratio.log()).mean()
            history.append(
                {
                    "loss/policy_avg": policy_losses.mean(),
                    "policy/entropy_avg": entropy,
                    "policy/approxkl_avg": approx_kl,
                    "policy/clipfrac_avg": (-gain * clipped > -gain * ratio).float().mean(),
                    "val/ratio": ratio.mean(),
                    "val/ratio_max": ratio.max(),
                    "loss/value_avg": value_losses.mean(),
                    "val/clipfrac_avg": ((near - target) ** 2 > (value - target) ** 2)
                    .float()
                    .mean(),
                    "policy/grad_norm": norms[0],
                    "val/grad_norm": norms[1],
                    "lr": self.rates[0] * share,
                    "lr/critic": self.rates[1] * share,
                }
            )
            if config.target_kl is not None and not warmup:
                stopped = bool(approx_kl > 1.5 * config.target_kl)
            if stopped:
                skipped += 1
            else:
                self.optimizer.step()
        columns = {
            name: torch.tensor([float(torch.as_tensor(h[name]).detach()) for h in history])
            for name in history[0]
        }
        metrics = {name: column.mean() for name, column in columns.items()}
        ratios = columns["val/ratio"]
        metrics |= {"lr": columns["lr"][-1], "lr/critic": columns["lr/critic"][-1]}
        metrics |= {"val/ratio_first": ratios[0], "val/ratio_var": ratios.var(correction=0)}
        metrics["val/ratio_max"] = columns["val/ratio_max"].max()
        if warmup:
            of_policy = ("policy/e", "policy/a", "policy/c", "val/ratio", "loss/policy")
            metrics = {k: v for k, v in metrics.items() if not k.startswith(of_policy)}
            metrics["policy/grad_norm"] = 0.0
        return metrics | {"policy/updates_skipped": skipped, "policy/bad_updates": 0}


@pytest.mark.parametrize("method", CASES)
def test_steps_are_those_of_plain_ppo(method, monkeypatch):
    config = settings(method=method, **COMMON | CASES[method])
    source = plain_model(vocab_size=8)
    with torch.no_grad():
        source.value_head.weight.mul_(0.3)
    torch.manual_seed(0)
    models = method_from_model(method, source, lora=config)
    assert torch.equal(models.critic.value_head.weight, source.value_head.weight)
    assert torch.equal(models.reward.reward_head.weight, source.reward_head.weight)
    plain = Plain(config, copy.deepcopy(models))
    rollouts, orders = [], []
    real_update, real_minibatches = ppo.update, updates.minibatches

    def update(run, step, experience):
        rollouts.append(experience.rollout)
        return real_update(run, step, experience)

    def minibatches(*args):
        orders.append(real_minibatches(*args))
        return orders[-1]

    monkeypatch.setattr(ppo, "update", update)
    monkeypatch.setattr(updates, "minibatches", minibatches)
    reported = numbers(run(config, models, prompts=WORDS))
    epochs = config.num_ppo_epochs
    for step, (rollout, metrics) in enumerate(zip(rollouts, reported, strict=True), 1):
        assert 0 < rollout.ended.sum() < len(rollout), "both kinds of responses"
        expected = plain.step(step, rollout, orders[(step - 1) * epochs : step * epochs])
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(float(value), rel=2e-4, abs=2e-6), (step, name)
        others = {name for name in metrics if not name.startswith("reuse/")} - expected.keys()
        assert others <= {"val/rollout_logprob_diff"}
    early = [metrics["policy/updates_skipped"] > 0 for metrics in reported]
    assert any(early) == (method == "j-hydra-ppo")
    whole = torch.arange(config.local_batch_size).tolist()
    for order in orders:
        assert sorted(torch.cat(order).tolist()) == whole
    assert len({str(order) for order in orders}) == len(orders), "each epoch has its own order"
    for name, ours in plain.groups.items():
        theirs = getattr(models, f"{name}_parameters")()
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)

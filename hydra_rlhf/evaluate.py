"""Policies side by side on the same prompts.

A policy is a checkpoint, a PEFT adapter folder, or the run folder of either. Each samples one
answer a prompt from the same seed; a judge scores or compares the answers. The first policy is the
baseline that win rates and the KL are against.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.table import Table
from torch import Tensor

from hydra_rlhf import hub
from hydra_rlhf import rollout as rollouts
from hydra_rlhf.data import Prompt
from hydra_rlhf.errors import UserError, first_line
from hydra_rlhf.model import HydraModel
from hydra_rlhf.pretrained import base_of
from hydra_rlhf.records import table
from hydra_rlhf.rewards import call_reward_fn
from hydra_rlhf.rollout import Sampling
from hydra_rlhf.statistics import Estimate, distinct, mean_interval, wins

# f(prompts=..., completions=..., **columns) -> one number each
ScoreFn = Callable[..., Sequence[float]]


class PairJudge(Protocol):
    """Compares answers two at a time, as a chat endpoint does."""

    name: str

    def compare(self, prompts: list[str], ours: list[str], theirs: list[str]) -> list[float]:
        """For each prompt 1 if ``ours`` is better, 0 if ``theirs`` is, 0.5 for a tie."""
        ...


@dataclass
class ScoreJudge:
    """A judge that gives each answer a number; comparisons follow from it."""

    name: str
    fn: ScoreFn


@dataclass
class Answers:
    """What one policy said. Lists have one entry a prompt."""

    policy: str
    responses: list[str]
    tokens: list[int]
    ended: list[bool]  # a stop token came before the length ran out
    kl: list[float] | None = None  # log-probability of the answer under the policy less baseline's
    nll: list[float] | None = None  # -log-probability under the baseline, in nats
    rewards: list[float] | None = None  # by the baseline's reward head


@dataclass
class PolicyReport:
    """One policy's row."""

    policy: str
    score: Estimate | None
    reward: Estimate | None
    win_rate: Estimate | None  # against the baseline
    kl: Estimate | None
    perplexity: float | None  # of the answers under the baseline
    length: float  # tokens
    ended: float  # share
    distinct_2: float
    rouge: dict[str, float] | None = None


@dataclass
class Evaluation:
    """What was measured; ``to_json`` has every figure and every answer."""

    judge: str
    num_prompts: int
    policies: list[PolicyReport]
    win_rates: list[list[Estimate | None]]  # [i][j]: policy i against policy j
    prompts: list[str] = field(repr=False)
    answers: list[Answers] = field(repr=False)
    scores: list[list[float]] | None = field(repr=False, default=None)  # [policy][prompt]
    sampling: dict[str, Any] | None = None  # the settings that the policies answered with

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


@torch.no_grad()
def answer(
    name: str,
    model: HydraModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    baseline: HydraModel | None = None,
    reward_model: HydraModel | None = None,
    role: str = "reference",
    seed: int = 0,
    batch_size: int = 64,
    apply_chat_template: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Answers:
    """Sample one answer a prompt.

    Args:
        name: The policy's.
        model: Whose ``role`` samples; "reference" is a model without adapters.
        tokenizer: Of the policy.
        prompts: What to answer.
        sampling: How; see ``rollout.sampling_of``.
        baseline: With the same tokenizer; gives ``kl``, ``nll`` and its head's ``rewards``.
        reward_model: With the same tokenizer; gives ``rewards`` instead, of its reward head.
        seed: Of the sampler: the same for each policy, and apart from the global generator.
        batch_size: Prompts at a time.
        apply_chat_template: Wrap each prompt in the tokenizer's chat template, as one user turn.
        on_batch: Called with the number of prompts done.

    Raises:
        UserError: a prompt has no tokens, or too many; before the first is answered.
    """
    answers = Answers(name, [], [], [])
    if baseline is not None:
        answers.kl, answers.nll = [], []
        if reward_model is None and bool(baseline.reward_head.weight.any()):
            reward_model = baseline
    if reward_model is not None:
        answers.rewards = []
    encode = functools.partial(
        rollouts.encode_prompts,
        tokenizer,
        max_length=_room(model, sampling),
        apply_chat_template=apply_chat_template,
    )
    if prompts:
        encode([prompt.prompt for prompt in prompts])  # what cannot be answered, by its own number
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            texts = [prompt.prompt for prompt in prompts[start : start + batch_size]]
            ids, mask = encode(texts, device=model.device)
            rollout = rollouts.generate(model, ids, mask, sampling, role=role)
            answers.responses += rollouts.decode(tokenizer, rollout)
            answers.tokens += rollout.response_mask.sum(-1).tolist()
            answers.ended += rollout.ended.tolist()
            parts = (rollout.query_responses, rollout.attention_mask, rollout.response_mask)
            if baseline is not None:
                own = reward_model is baseline  # one pass then serves both
                _against(baseline, model, role, parts, sampling, answers, rewards=own)
            if reward_model is not None and reward_model is not baseline:
                scores = reward_model.score(*parts, roles=["reward"]).scores
                assert answers.rewards is not None and scores is not None
                answers.rewards += scores.tolist()
            if on_batch is not None:
                on_batch(min(start + batch_size, len(prompts)))
    return answers


def _against(
    baseline: HydraModel,
    model: HydraModel,
    role: str,
    parts: tuple[Tensor, Tensor, Tensor],
    sampling: Sampling,
    answers: Answers,
    *,
    rewards: bool,
) -> None:
    roles = ["reference", *(["reward"] if rewards else [])]
    theirs = baseline.score(*parts, roles=roles, temperature=sampling.temperature)
    assert answers.kl is not None and answers.nll is not None and theirs.ref_logprobs is not None
    if model is baseline and role == "reference":
        ours = theirs.ref_logprobs
    else:
        scored = model.score(*parts, roles=[role], temperature=sampling.temperature)
        logprobs = scored.logprobs if role == "actor" else scored.ref_logprobs
        assert logprobs is not None
        ours = logprobs
    answers.kl += (ours - theirs.ref_logprobs).sum(-1).tolist()
    answers.nll += (-theirs.ref_logprobs.sum(-1)).tolist()
    if answers.rewards is not None and theirs.scores is not None:
        answers.rewards += theirs.scores.tolist()


def judge_answers(
    prompts: Sequence[Prompt],
    answers: Sequence[Answers],
    judge: ScoreJudge | PairJudge,
    *,
    seed: int = 0,
    rouge: bool = False,
) -> Evaluation:
    """Score or compare the answers and put intervals around the means.

    Raises:
        UserError: a policy has another number of answers, or the judge fails on one.
    """
    texts = [prompt.prompt for prompt in prompts]
    for given in answers:
        if len(given.responses) != len(texts):
            raise UserError(
                f"{given.policy} has {len(given.responses)} answers for {len(texts)} prompts"
            )
    scores: list[list[float]] | None = None
    if isinstance(judge, ScoreJudge):
        columns = columns_of(prompts)
        scores = [
            call_reward_fn(judge.fn, texts, a.responses, columns, torch.device("cpu")).tolist()
            for a in answers
        ]
    count = len(answers)
    matrix: list[list[Estimate | None]] = [[None] * count for _ in range(count)]
    for i in range(count):
        for j in range(i + 1, count):
            if scores is not None:
                won = wins(scores[i], scores[j])
            else:
                won = judge.compare(  # type: ignore[union-attr]
                    texts, answers[i].responses, answers[j].responses
                )
            ours = mean_interval(won, seed=seed)
            matrix[i][j] = ours
            matrix[j][i] = Estimate(1.0 - ours.mean, 1.0 - ours.high, 1.0 - ours.low)
    reports = []
    for i, given in enumerate(answers):
        nll = None if given.nll is None else sum(given.nll) / max(sum(given.tokens), 1)
        reports.append(
            PolicyReport(
                policy=given.policy,
                score=None if scores is None else mean_interval(scores[i], seed=seed),
                reward=None if given.rewards is None else mean_interval(given.rewards, seed=seed),
                win_rate=matrix[i][0] if i else None,
                kl=None if given.kl is None or not i else mean_interval(given.kl, seed=seed),
                perplexity=None if nll is None else float(torch.tensor(nll).exp()),
                length=sum(given.tokens) / len(given.tokens),
                ended=sum(given.ended) / len(given.ended),
                distinct_2=distinct(given.responses, 2),
                rouge=_rouge(prompts, given.responses) if rouge else None,
            )
        )
    return Evaluation(judge.name, len(texts), reports, matrix, texts, list(answers), scores)


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The other columns of the prompts' rows, as a reward function gets them."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.extra)
    return {name: [prompt.extra.get(name) for prompt in prompts] for name in names}


REWARD_JUDGE = "reward"  # the baseline's reward head: its scores are the rewards


def summary_table(evaluation: Evaluation, title: str) -> Table:
    """One row a policy."""
    first = evaluation.policies[0]
    columns = ["policy"]
    numeric = []
    if first.score is not None:
        numeric.append(f"{evaluation.judge} [95%]")
    numeric += ["win rate vs " + first.policy + " [95%]"]
    has_reward = first.reward is not None and evaluation.judge != REWARD_JUDGE  # else it is there
    if has_reward:
        numeric.append("RM reward")
    numeric += ["KL", "length", "ended", "distinct-2"]
    if first.rouge is not None:
        numeric.append("ROUGE-1/2/L")
    rows = []
    for report in evaluation.policies:
        row = [report.policy]
        if first.score is not None:
            row.append(interval(report.score))
        row.append(interval(report.win_rate, percent=True))
        if has_reward:
            row.append("-" if report.reward is None else f"{report.reward.mean:.2f}")
        row += [
            "-" if report.kl is None else f"{report.kl.mean:.1f}",
            f"{report.length:.1f}",
            f"{100 * report.ended:.0f}%",
            f"{report.distinct_2:.2f}",
        ]
        if report.rouge is not None:
            row.append("/".join(f"{f:.2f}" for f in report.rouge.values()))
        rows.append(row)
    return table(title, columns + numeric, rows, numeric=len(numeric))


def matrix_table(evaluation: Evaluation) -> Table:
    """Win rates of every policy (row) against every other (column)."""
    names = [report.policy for report in evaluation.policies]
    rows = [
        [name, *(interval(cell, percent=True) for cell in cells)]
        for name, cells in zip(names, evaluation.win_rates, strict=True)
    ]
    return table("Win rate of row against column", ["", *names], rows, numeric=len(names))


def interval(estimate: Estimate | None, *, percent: bool = False) -> str:
    if estimate is None:
        return "-"
    if percent:
        mean, low, high = (100.0 * x for x in estimate)
        return f"{mean:.1f}% [{low:.1f}, {high:.1f}]"
    return f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def answer_table(evaluation: Evaluation, count: int) -> Table:
    """The first prompts, unpicked, with every policy's answer and its scores."""
    rows = []
    has_reward = evaluation.judge != REWARD_JUDGE and any(
        given.rewards is not None for given in evaluation.answers
    )
    for i in range(min(count, evaluation.num_prompts)):
        for k, given in enumerate(evaluation.answers):
            row = [
                evaluation.prompts[i] if k == 0 else "",
                given.policy,
                given.responses[i].strip(),
            ]
            if evaluation.scores is not None:
                row.append(f"{evaluation.scores[k][i]:.2f}")
            if has_reward:
                row.append("-" if given.rewards is None else f"{given.rewards[i]:.2f}")
            rows.append(row)
    numeric = [evaluation.judge] if evaluation.scores is not None else []
    numeric += ["RM reward"] if has_reward else []
    columns = ["prompt", "policy", "answer", *numeric]
    return table("The first prompts", columns, rows, numeric=len(numeric))


def draw(evaluation: Evaluation, path: Path) -> Path | None:
    """Scores and win rates with their intervals as a PNG; None without matplotlib."""
    from hydra_rlhf import curves

    return curves.draw_evaluation(evaluation, path)


def gold(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The gold reward of the bundled task, as a judge."""
    from hydra_rlhf.data import bundled

    return [bundled.gold_reward(p, c) for p, c in zip(prompts, completions, strict=True)]


def _rouge(prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, float]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError("ROUGE needs rouge-score: pip install 'hydra-rlhf[eval]'") from error
    references = [_reference(prompt, i) for i, prompt in enumerate(prompts)]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scored = [scorer.score(r, a) for r, a in zip(references, responses, strict=True)]
    return {
        name: sum(one[name].fmeasure for one in scored) / len(scored)
        for name in ("rouge1", "rouge2", "rougeL")
    }


def _reference(prompt: Prompt, index: int) -> str:
    for name in ("reference", "completion", "chosen"):
        if isinstance(prompt.extra.get(name), str):
            return prompt.extra[name]
    raise UserError(
        f"ROUGE needs a reference, completion or chosen column; prompt {index + 1} has none"
    )


def _room(model: HydraModel, sampling: Sampling) -> int | None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return None
    if context <= sampling.response_length:
        raise UserError(
            f"response_length {sampling.response_length} leaves no room for a prompt in a context "
            f"of {context} tokens"
        )
    return context - sampling.response_length


# Loading


def load_policy(
    path: str | Path, *, base: str | Path | None = None, device: Any = None
) -> tuple[HydraModel, Any]:
    """A checkpoint, a PEFT adapter folder or a run folder, as a model without adapters.

    Args:
        path: What to load. Of a run folder: the PPO actor if there is one, else the SFT model.
        base: What an adapter is for; None reads it from the adapter's own configuration.
        device: Where to.

    Raises:
        UserError: nothing loadable is there.
    """
    import peft
    from safetensors import SafetensorError

    path = resolve_policy(path)
    if not (Path(path) / "adapter_config.json").is_file():
        model = HydraModel.from_pretrained(path, device=device)
        return model.eval(), load_tokenizer(path)
    try:
        config = peft.PeftConfig.from_pretrained(str(path))
        base = base or base_of(path, config.base_model_name_or_path)
        if base is None:
            raise UserError(f"the adapter {path} does not name its base model; give --base")
        plain = HydraModel.from_pretrained(base, device=device)
        merged = peft.PeftModel.from_pretrained(plain.causal_lm, str(path)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot load the adapter {path}: {first_line(error)}") from error
    model = HydraModel(merged, reward_head=plain.reward_head)
    return model.eval(), load_tokenizer(base)


def resolve_checkpoint(path: str | Path) -> str:
    """The SFT model inside a run folder; any other path as it is.

    Raises:
        UserError: the run has no model yet, or the path is that of an adapter.
    """
    folder = Path(path)
    if (folder / "run.json").is_file():
        for inside in ("model", "sft"):
            if (folder / inside).is_dir():
                return str(folder / inside)
        if any((folder / adapter).is_dir() for adapter in ("actor", "joint")):
            raise UserError(
                f"{folder} is a run of ppo, which holds an adapter: to go on from its policy, "
                f"merge it (hydra-rlhf export {folder} FOLDER --merge)"
            )
        raise UserError(f"the run folder {folder} holds no finished SFT model")
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} is an adapter, not a whole model: merge it first "
            f"(hydra-rlhf export {folder} FOLDER --merge)"
        )
    return str(path)


def resolve_policy(path: str | Path) -> str:
    """The checkpoint or adapter inside a run folder; any other path as it is."""
    folder = Path(path)
    if (folder / "run.json").is_file():
        for inside in ("ppo/actor", "ppo/joint", "actor", "joint", "model", "sft"):
            if (folder / inside).is_dir():
                return str(folder / inside)
        raise UserError(f"the run folder {folder} holds no finished model")
    return str(path)


# One of these is in every folder with a tokenizer of transformers'.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "spm*", "*.py")


def load_tokenizer(path: str | Path) -> Any:
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any(p for form in _TOKENIZER_FILES for p in folder.glob(form)):
        raise UserError(
            f"cannot load a tokenizer from {path}: there is none in it; copy the tokenizer's files "
            "from the model that this one was made from"
        )
    with hub.loading("a tokenizer", path, KeyError):
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)

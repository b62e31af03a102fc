"""``hydra-rlhf evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hydra_rlhf import data, evaluate, hub, overoptimisation, run_sampling, sft
from hydra_rlhf.commands.inputs import choose_backend
from hydra_rlhf.curves import draw_overoptimisation
from hydra_rlhf.data import Prompt, bundled
from hydra_rlhf.errors import UserError
from hydra_rlhf.evaluate import Answers, Evaluation, PairJudge, ScoreJudge
from hydra_rlhf.judge import ChatJudge
from hydra_rlhf.overoptimisation import Curve
from hydra_rlhf.records import Tracker
from hydra_rlhf.rewards import ClassifierReward, load_reward_fn
from hydra_rlhf.rollout import Sampling, pad_token_id, stop_token_ids
from hydra_rlhf.run_sampling import Chosen
from hydra_rlhf.settings import required, setting


@dataclass
class EvaluateConfig:
    """Which policies, on which prompts, judged by what."""

    policies: list[str] = required(
        "one or more of NAME=PATH or PATH: checkpoints, PEFT adapter folders or run folders; the "
        "first is the baseline"
    )
    along: bool = setting(
        False,
        "the policies are run folders of ppo with checkpoints (--save-steps): evaluate each "
        "checkpoint, and set the learned reward against the judge's over the KL",
    )
    base: str | None = setting(
        None, "model the adapters are for, where their configuration does not say"
    )
    prompts: str = setting("bundled", "a file, a folder, a hub name, or bundled: the demo's task")
    prompt_split: str | None = setting(None, "split of the prompts")
    num_prompts: int = setting(200, "how many of them; 0 for all")
    judge: str = setting(
        "auto",
        "gold: the bundled task's; reward: the baseline's reward head; module:function "
        "or file.py:function; or the path of a sequence classifier. auto is gold on the bundled "
        "prompts, else reward",
    )
    judge_url: str | None = setting(
        None,
        "OpenAI-compatible endpoint, whose chat model judges instead; key from the environment",
    )
    judge_model: str | None = setting(None, "the chat model's name there")
    judge_cache: str | None = setting(None, "file that keeps its replies, so that a run can resume")
    judge_prices: list[float] = field(
        default_factory=list,
        metadata={"help": "cost of a million prompt tokens and of a million reply tokens"},
    )
    temperature: float | None = setting(
        None,
        "of sampling; 0 is greedy. This and the next seven, where not set, are those that the "
        "policies' runs of ppo were trained with; where no policy has such a run, 1.0",
    )
    response_length: int | None = setting(None, "most tokens in an answer; else 64")
    top_k: int | None = setting(None, "sample from the k likeliest tokens; else 0, which is off")
    top_p: float | None = setting(None, "nucleus sampling; else 1, which is off")
    min_response_length: int | None = setting(
        None, "fewest tokens before a stop token may come; else 0"
    )
    stop_token: str | None = setting(
        None, "text of one token at which an answer ends besides EOS; else eos"
    )
    stop_token_id: int | None = setting(None, "the id of that token, in place of stop_token")
    apply_chat_template: bool | None = setting(
        None, "wrap text prompts in each policy's chat template, as one user turn; else false"
    )
    batch_size: int = setting(64, "prompts answered at a time")
    rouge: bool = setting(False, "ROUGE against a reference, completion or chosen column")
    output: str | None = setting(
        None, "folder for evaluation.json and .png; with --along, overoptimisation.json and .png"
    )
    seed: int = setting(0, "of sampling and of the bootstrap")
    show: int = setting(3, "prompts whose answers are printed")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes a GPU where there is one")
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = setting(
        "auto", "kernels to run; one that is named runs everywhere or the command stops"
    )

    def __post_init__(self) -> None:
        for name in ("response_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        for name in ("temperature", "num_prompts", "show", "top_k", "min_response_length"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{name} must not be negative, got {value}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")
        if (self.judge_url is None) != (self.judge_model is None):
            raise UserError("judge_url and judge_model go together")
        if len(self.judge_prices) not in (0, 2):
            raise UserError(f"judge_prices must be two numbers, got {len(self.judge_prices)}")


ARGUMENTS = (EvaluateConfig,)
POSITIONALS = ("policies*",)


def run(config: EvaluateConfig) -> Evaluation | list[Curve]:
    """Samples, judges, prints; writes JSON and PNG where ``output`` is set."""
    if config.output is not None and Path(config.output).is_file():
        raise UserError(f"output {config.output} is a file, not a folder")
    choose_backend(config.backend)
    named = [_named(policy) for policy in config.policies]
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise UserError(f"two policies have the same name: {', '.join(names)}; use NAME=PATH")
    for _, path in named:  # before the first of them has answered
        problem = hub.missing(evaluate.resolve_policy(path))
        if problem is not None:
            raise UserError(f"no policy {path}: {problem}")
    device = sft.make_accelerator(config.device).device
    if config.along:
        return _along(config, named, device)
    baseline, tokenizer = evaluate.load_policy(named[0][1], base=config.base, device=device)
    prompts = _prompts(config, tokenizer)
    chosen = _sampling_settings(config, named, prompts)
    judge = _judge(config, device)
    if judge is None and not bool(baseline.reward_head.weight.any()):
        raise UserError(f"judge 'reward': {named[0][1]} has no reward head; give --judge")
    tracker = Tracker(None)
    tracker.say(str(chosen))
    answers: list[Answers] = []
    with tracker.progress("Answers", len(named) * len(prompts)) as bar:
        for index, (name, path) in enumerate(named):
            model, own = baseline, tokenizer
            if index:
                model, own = evaluate.load_policy(path, base=config.base, device=device)
            same = own.get_vocab() == tokenizer.get_vocab()

            def on_batch(done: int, before: int = index * len(prompts)) -> None:
                bar.update(before + done)

            answers.append(
                evaluate.answer(
                    name,
                    model,
                    own,
                    prompts,
                    _sampling(chosen, own),
                    # Log-probabilities of one vocabulary mean nothing in another.
                    baseline=baseline if same else None,
                    seed=config.seed,
                    batch_size=config.batch_size,
                    apply_chat_template=chosen.values["apply_chat_template"],
                    on_batch=on_batch,
                )
            )
    if judge is None:
        judge = _reward_judge(answers)
    evaluation = evaluate.judge_answers(
        prompts, answers, judge, seed=config.seed, rouge=config.rouge
    )
    evaluation.sampling = chosen.values
    _show(config, tracker, evaluation)
    if judge.name == evaluate.REWARD_JUDGE:
        tracker.say("note: judged by the reward head that PPO trains against; --judge for another")
    if isinstance(judge, ChatJudge):
        tracker.say(judge.summary())
    if config.output is not None:
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(evaluation.to_json(), encoding="utf-8")
        drawn = evaluate.draw(evaluation, folder / "evaluation.png")
        tracker.say(f"Written: {folder / 'evaluation.json'}{f' and {drawn}' if drawn else ''}")
    return evaluation


def _along(config: EvaluateConfig, named: list[tuple[str, str]], device: Any) -> list[Curve]:
    judge = _judge(config, device)
    if not isinstance(judge, ScoreJudge):
        raise UserError("--along needs a judge that scores answers and was not trained on: --judge")
    tracker = Tracker(None)
    curves = []
    for name, path in named:
        ppo_run = overoptimisation.open_run(path, base=config.base, device=device)
        prompts = _prompts(config, ppo_run.tokenizer)
        chosen = _sampling_settings(config, [(name, path)], prompts)
        tracker.say(str(chosen))
        with tracker.progress(name, 1 + len(ppo_run.adapters)) as bar:
            curve = overoptimisation.follow(
                name,
                ppo_run,
                prompts,
                judge,
                _sampling(chosen, ppo_run.tokenizer),
                seed=config.seed,
                batch_size=config.batch_size,
                apply_chat_template=chosen.values["apply_chat_template"],
                on_policy=bar.update,
            )
        curves.append(curve)
        tracker.say()
        tracker.show(overoptimisation.points_table(curve))
        tracker.say(curve.verdict())
    if config.output is not None:
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / "overoptimisation.json"
        written.write_text(overoptimisation.to_json(curves), encoding="utf-8")
        drawn = draw_overoptimisation(curves, written.with_suffix(".png"))
        tracker.say(f"Written: {written}{f' and {drawn}' if drawn else ''}")
    return curves


def _sampling_settings(
    config: EvaluateConfig, policies: list[tuple[str, str]], prompts: list[Prompt]
) -> Chosen:
    given = {name: getattr(config, name) for name in run_sampling.DEFAULTS}
    chosen = run_sampling.choose(given, policies)
    least, most = (chosen.values[f"{which}response_length"] for which in ("min_", ""))
    if least > most:
        raise UserError(f"min_response_length {least} is above response_length {most}")
    # Messages have been put into the template already: a run's setting was about its own prompts.
    if chosen.values["apply_chat_template"] and any("prompt_messages" in p.extra for p in prompts):
        if config.apply_chat_template:
            raise UserError(
                f"apply_chat_template is for text prompts; {config.prompts} has messages, which "
                "the chat template has made into text already"
            )
        chosen.values["apply_chat_template"] = False
    return chosen


def _sampling(chosen: Chosen, tokenizer: Any) -> Sampling:
    values = chosen.values
    return Sampling(
        response_length=values["response_length"],
        temperature=values["temperature"] or 1.0,
        stop_ids=stop_token_ids(tokenizer, values["stop_token"], values["stop_token_id"]),
        pad_id=pad_token_id(tokenizer),
        top_k=values["top_k"],
        top_p=values["top_p"],
        min_response_length=values["min_response_length"],
        do_sample=values["temperature"] > 0,
    )


def _show(config: EvaluateConfig, tracker: Tracker, evaluation: Evaluation) -> None:
    tracker.say()
    if config.show:
        tracker.show(evaluate.answer_table(evaluation, config.show))
        tracker.say()
    title = f"{evaluation.num_prompts} prompts, judged by {evaluation.judge}"
    tracker.show(evaluate.summary_table(evaluation, title))
    if len(evaluation.policies) > 2:
        tracker.say()
        tracker.show(evaluate.matrix_table(evaluation))


def _named(policy: str) -> tuple[str, str]:
    name, separator, path = policy.partition("=")
    if separator:
        return name, path
    parts = Path(policy).parts
    if len(parts) > 1 and parts[-1] in ("actor", "joint", "model", "sft", "ppo"):
        return "/".join(parts[-2:]), policy
    return (parts[-1] if parts else policy), policy


def _prompts(config: EvaluateConfig, tokenizer: Any) -> list[Prompt]:
    if config.prompts == "bundled":
        prompts = bundled.demo_prompts("test")
    else:
        prompts = data.load_prompts(config.prompts, split=config.prompt_split, tokenizer=tokenizer)
    if not prompts:
        raise UserError(f"{config.prompts} holds no prompts")
    return prompts[: config.num_prompts] if config.num_prompts else prompts


def _judge(config: EvaluateConfig, device: Any) -> ScoreJudge | PairJudge | None:
    """None where the baseline's reward head judges: its rewards come with the answers."""
    if config.judge_url is not None and config.judge_model is not None:
        sent, got = config.judge_prices or (0.0, 0.0)
        return ChatJudge(
            config.judge_url, config.judge_model, cache=config.judge_cache, prices=(sent, got)
        )
    name = config.judge
    if name == "auto":
        name = "gold" if config.prompts == "bundled" else "reward"
    if name == evaluate.REWARD_JUDGE:
        return None
    if name == "gold":
        return ScoreJudge("gold", evaluate.gold)
    if ":" in name and not Path(name).exists():
        return ScoreJudge(name, load_reward_fn(name))
    return ScoreJudge(Path(name).name, ClassifierReward(name, device=device))


def _reward_judge(answers: list[Answers]) -> ScoreJudge:
    for given in answers:
        if given.rewards is None:
            raise UserError(
                f"judge 'reward' needs a baseline with a reward head, and the same tokenizer for "
                f"{given.policy}; give --judge"
            )
    queue = iter(answers)
    return ScoreJudge(evaluate.REWARD_JUDGE, lambda **given: next(queue).rewards or [])

"""How to sample from policies that are compared: as they were trained, unless told otherwise.

A run of PPO has its settings in config.yaml. Its policy at another temperature is another policy,
of another KL and another score, so an evaluation takes the temperature, and whatever else shapes an
answer, from the runs that its policies lie in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hydra_rlhf import rollout as rollouts
from hydra_rlhf.errors import UserError
from hydra_rlhf.records import MARKER

# What shapes an answer, and what it is where no run says: the policy itself.
DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "response_length": 64,
    "top_k": 0,
    "top_p": 1.0,
    "min_response_length": 0,
    "stop_token": "eos",
    "stop_token_id": None,
    "apply_chat_template": False,
}
_ALWAYS_SAID = ("temperature", "response_length")
_DEPTH = 3  # a policy lies at most so deep in its run: checkpoints/step-00000100/actor


@dataclass(frozen=True)
class Chosen:
    """Values of DEFAULTS' settings, and where each is from: a flag as typed, a run, "default"."""

    values: dict[str, Any]
    sources: dict[str, str]

    def __str__(self) -> str:
        parts = [
            f"{name} {value} ({self.sources[name]})"
            for name, value in self.values.items()
            if name in _ALWAYS_SAID or value != DEFAULTS[name]
        ]
        return "Sampling: " + ", ".join(parts)


def choose(given: Mapping[str, Any], policies: Iterable[tuple[str, str | Path]]) -> Chosen:
    """Each setting as it is given, else as the policies' runs have it, else as in DEFAULTS.

    Args:
        given: Settings by name; None for one that is not given.
        policies: Name and path of each: a run, what lies in one, or any other model, which records
            nothing.

    Raises:
        UserError: two runs differ in a setting that is not given, or one's record does not read.
    """
    runs = [(name, recorded(path)) for name, path in policies]
    given = {name: value for name, value in given.items() if value is not None}
    if "stop_token" in given or "stop_token_id" in given:  # one thing, said in two ways
        given = {"stop_token": DEFAULTS["stop_token"], "stop_token_id": None} | given
    values, sources = {}, {}
    for name, default in DEFAULTS.items():
        flag = "--" + name.replace("_", "-")
        found = [(run, settings[name]) for run, settings in runs if name in settings]
        if name in given:
            values[name], sources[name] = given[name], flag
        elif found:
            values[name], sources[name] = found[0][1], f"as {found[0][0]} was trained"
            for run, value in found[1:]:
                if value != found[0][1]:
                    raise UserError(
                        f"{found[0][0]} was trained with {name} {found[0][1]}, {run} with {value}: "
                        f"give {flag} to sample all policies alike"
                    )
        else:
            values[name], sources[name] = default, "default"
    return Chosen(values, sources)


def recorded(path: str | Path) -> dict[str, Any]:
    """Of DEFAULTS' settings those in the record of the PPO run that ``path`` is, or lies in.

    Empty where there is no such run.

    Raises:
        UserError: its config.yaml does not read.
    """
    if not Path(path).is_dir():
        return {}
    folder = Path(path).resolve()
    for run_dir in (folder, *folder.parents)[: _DEPTH + 1]:
        if (run_dir / MARKER).is_file():
            break
    else:
        return {}
    file = run_dir / "config.yaml"
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the settings of a run from {file}: {error}") from error
    settings = sections.get("ppo") if isinstance(sections, dict) else None
    if not isinstance(settings, dict):
        return {}
    return {name: settings[name] for name in DEFAULTS if name in settings}


def generation_config(
    settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """What makes ``generate``, or vLLM, sample a policy as it was trained.

    Nothing of the base's own file is left: what a base was tuned to be sampled with, such as a
    repetition penalty, is not what the policy was rewarded for. How long an answer may be is left
    to whoever asks.

    Args:
        settings: Of DEFAULTS', as :func:`recorded` gives them.
        tokenizer: Of the policy.
    """
    values = DEFAULTS | dict(settings)
    stop_ids = rollouts.stop_token_ids(tokenizer, values["stop_token"], values["stop_token_id"])
    return GenerationConfig(
        do_sample=True,
        temperature=values["temperature"],
        top_k=values["top_k"],
        top_p=values["top_p"],
        min_new_tokens=values["min_response_length"] or None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(stop_ids),
        pad_token_id=rollouts.pad_token_id(tokenizer),
    )

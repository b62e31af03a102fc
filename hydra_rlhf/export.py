"""What leaves this project in other people's formats, and what comes in from them.

- :func:`merge_adapter`: an adapter melted into its base, as a plain Hugging Face model;
- :func:`export_classifier`: trunk and reward head as ``AutoModelForSequenceClassification``;
- :func:`import_value_head`: the head of a TRL ``AutoModelForCausalLMWithValueHead`` checkpoint.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import peft
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from hydra_rlhf import evaluate, run_sampling
from hydra_rlhf.errors import UserError, first_line
from hydra_rlhf.model import REWARD_HEAD, HydraModel, load_causal_lm
from hydra_rlhf.pretrained import TRL_HEAD, base_of, head_file, trl_value_head

_log = logging.getLogger("hydra_rlhf")


def merge_adapter(adapter: str | Path, out: str | Path, *, base: str | Path | None = None) -> Path:
    """Writes base + adapter as one model that needs neither PEFT nor this package.

    The policy of a PPO run gets a generation_config.json that samples it as it was trained; any
    other keeps its base's.

    Args:
        adapter: PEFT folder, such as ``run/actor``.
        out: Folder to write; must not hold anything yet.
        base: The model the adapter is for; None takes what its configuration says.

    Returns:
        ``out``.

    Raises:
        UserError: the adapter, its base or the record of its run cannot be read, or ``out`` is not
            empty.
    """
    out = _empty_folder(out)
    adapter = Path(adapter)
    if (adapter / "config.json").is_file():
        raise UserError(f"{adapter} is a whole model already: load or copy it as it is")
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter} is not a PEFT folder: it has no adapter_config.json")
    try:
        config = peft.PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"cannot read {adapter}/adapter_config.json: {first_line(e)}") from e
    base = base or base_of(adapter, config.base_model_name_or_path)
    if not base:
        raise UserError(f"{adapter} does not say which model it is for; give --base")
    lm = load_causal_lm(base)
    try:
        merged = peft.PeftModel.from_pretrained(lm, str(adapter)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as e:
        raise UserError(f"{adapter} does not fit {base}: {first_line(e)}") from e
    settings = run_sampling.recorded(adapter)
    if settings:
        tokenizer = evaluate.load_tokenizer(base)
        merged.generation_config = run_sampling.generation_config(settings, tokenizer)
    merged.save_pretrained(out)
    _copy_tokenizer(base, out)
    return out


def export_classifier(model: str | Path, out: str | Path) -> Path:
    """Writes trunk and reward head as a one-label sequence classifier.

    transformers' classifiers score the last token before padding, which is where the reward head
    scores. Other trainers take the result as a reward model.

    Args:
        model: A Hydra checkpoint: Hugging Face files with heads/reward_head.safetensors.
        out: Folder to write; must not hold anything yet.

    Returns:
        ``out``.

    Raises:
        UserError: there is no reward head, or the family has no classifier.
    """
    out = _empty_folder(out)
    hydra = HydraModel.from_pretrained(model)
    if not head_file(model, REWARD_HEAD).is_file():
        raise UserError(f"{model} has no reward head ({REWARD_HEAD})")
    settings = hydra.config.to_dict()
    for name in ("id2label", "label2id"):
        settings.pop(name, None)
    config = type(hydra.config).from_dict({**settings, "num_labels": 1})
    if config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id
    try:
        classifier = transformers.AutoModelForSequenceClassification.from_config(config)
    except ValueError as e:
        raise UserError(f"transformers has no classifier for {config.model_type}") from e
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear) or head.weight.shape != hydra.reward_head.weight.shape:
        raise UserError(f"the classifier of {config.model_type} has no head to put the reward in")
    classifier.to(hydra.trunk.dtype)
    getattr(classifier, classifier.base_model_prefix).load_state_dict(hydra.trunk.state_dict())
    with torch.no_grad():
        head.weight.copy_(hydra.reward_head.weight)
    if hydra.reward_head.bias is not None and bool(hydra.reward_head.bias.any()):
        bias = hydra.reward_head.bias.item()
        _log.warning("classifiers have no bias: scores of %s are lower by %.4g", out, bias)
    classifier.save_pretrained(out)
    _copy_tokenizer(model, out)
    return out


def import_value_head(path: str | Path) -> nn.Linear:
    """The value head of a TRL ``AutoModelForCausalLMWithValueHead`` checkpoint.

    TRL keeps it as ``v_head.summary.weight`` and ``.bias`` among the model's weights, where
    ``HydraModel.from_pretrained`` finds it by itself. Pickled checkpoints are read with
    ``weights_only``.

    Returns:
        A float32 linear (D -> 1), with TRL's bias where there is one.

    Raises:
        UserError: no weights, or no such head among them.
    """
    head = trl_value_head(Path(path))
    if head is None:
        raise UserError(f"{path} has no value head ({TRL_HEAD}*) in its weights")
    return head


def _empty_folder(path: str | Path) -> Path:
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"output folder {path} already holds something")
    return path


def _copy_tokenizer(source: str | Path, out: Path) -> None:
    """The tokenizer's files, where the source is a folder that has them."""
    names = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*")
    for pattern in names:
        for file in Path(source).glob(pattern):
            if file.is_file() and not (out / file.name).exists():
                shutil.copy(file, out / file.name)

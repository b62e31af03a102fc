"""``hydra-rlhf export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hydra_rlhf import evaluate, export
from hydra_rlhf.errors import UserError
from hydra_rlhf.settings import required, setting


@dataclass
class ExportConfig:
    """What to write, and from what."""

    source: str = required(
        "with --merge a PEFT adapter folder or a run of ppo; with --classifier a checkpoint or a "
        "run of sft"
    )
    output: str = required("folder to write; must not hold anything yet")
    merge: bool = setting(False, "melt the adapter into its base: a plain Hugging Face model")
    classifier: bool = setting(
        False, "trunk and reward head as AutoModelForSequenceClassification with one label"
    )
    base: str | None = setting(None, "with --merge, the base in place of the one the adapter names")


ARGUMENTS = (ExportConfig,)
POSITIONALS = ("source", "output")


def run(config: ExportConfig) -> Path:
    """Writes the one thing that was asked for."""
    if config.merge == config.classifier:
        raise UserError("export: give one of --merge and --classifier")
    if config.merge:
        adapter = evaluate.resolve_policy(config.source)
        out = export.merge_adapter(adapter, config.output, base=config.base)
    else:
        out = export.export_classifier(evaluate.resolve_checkpoint(config.source), config.output)
    print(f"wrote {out}")
    return out

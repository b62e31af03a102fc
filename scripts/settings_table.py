"""docs/settings.md from the dataclasses that are the settings.

python scripts/settings_table.py [--check]
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "settings.md"
sys.path.insert(0, str(ROOT))

HEAD = """# Settings

Made by `scripts/settings_table.py` from the dataclasses; a test compares. As a flag `lora_r` is
`--lora-r`; a switch that is on is turned off by `--no-...`. `--config FILE` takes them from YAML or
JSON, and a flag wins. Where a default comes from:

- [TRL] TRL 1.12, `trl.experimental.ppo.PPOConfig` or `ModelConfig`; [TRL 0.11] the older trainer;
- [PPO] Schulman et al. 2017, arXiv:1707.06347;
- [RLHF] Ziegler et al. 2019, arXiv:1909.08593; Stiennon et al. 2020, arXiv:2009.01325;
- [N+] Huang et al. 2024, arXiv:2403.17031, "The N+ implementation details of RLHF with PPO";
- [Hydra] Santacroce et al. 2023, arXiv:2309.00754;
- [ours] this project.
"""


def page() -> str:
    from hydra_rlhf.cli import COMMANDS

    parts, known = [HEAD], {}
    for command, (module, summary) in COMMANDS.items():
        parts.append(f"## hydra-rlhf {command}\n\n{summary[0].upper()}{summary[1:]}.\n")
        for settings in importlib.import_module(module).ARGUMENTS:
            if settings in known:
                parts.append(f"`{settings.__name__}`: [as above](#hydra-rlhf-{known[settings]}).\n")
                continue
            known[settings] = command
            parts.append(table(settings))
    return "\n".join(parts)


def table(settings: type) -> str:
    hints = typing.get_type_hints(settings)
    rows = [f"`{settings.__name__}`\n", "| setting | default | |", "| --- | --- | --- |"]
    for field in dataclasses.fields(settings):
        values = field.metadata.get("choices") or choices(hints[field.name])
        help_text = field.metadata["help"].replace("|", "\\|")
        if values:
            help_text += "<br>" + ", ".join(f"`{value}`" for value in values)
        rows.append(f"| `{field.name}` | {default(field)} | {help_text} |")
    return "\n".join(rows) + "\n"


def choices(hint: object) -> tuple[object, ...]:
    """The values of a Literal, bare or optional."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return next((found for arg in typing.get_args(hint) if (found := choices(arg))), ())


def default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return ""
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None or field.default == "":
        return ""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return f"`{field.default}`"


def sources(text: str) -> set[str]:
    """What stands in the brackets that end a help text: where the default comes from."""
    return set(re.findall(r"\[([^\]]+)\]", text))


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != page() and f"{PAGE} is old: run {sys.argv[0]}")
    PAGE.write_text(page())

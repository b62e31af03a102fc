"""``hydra-rlhf data check FILE``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from hydra_rlhf.data.check import Report, check, render
from hydra_rlhf.errors import UserError
from hydra_rlhf.evaluate import load_tokenizer
from hydra_rlhf.settings import required, setting


@dataclass
class DataConfig:
    """A set, and what to measure it with."""

    action: Literal["check"] = required("what to do; given as the first word")
    file: str = required("a file, a folder or a hub name; given as the second word")
    split: str | None = setting(None, "split of a folder or a hub set")
    format: str | None = setting(None, "name of its format, where the columns tell another")
    tokenizer: str | None = setting(None, "model or tokenizer folder, to count lengths in tokens")
    max_length: int | None = setting(None, "context to check the lengths against")
    json: bool = setting(False, "print the report as JSON")

    def __post_init__(self) -> None:
        if self.max_length is not None and self.tokenizer is None:
            raise UserError("data: max_length needs a tokenizer to count with")


ARGUMENTS = (DataConfig,)
POSITIONALS = ("action", "file")


def run(config: DataConfig) -> Report:
    """Prints the report.

    Raises:
        UserError: if the set cannot be trained on as it is.
    """
    report = check(
        config.file,
        split=config.split,
        format=config.format,
        tokenizer=load_tokenizer(config.tokenizer) if config.tokenizer is not None else None,
        max_length=config.max_length,
    )
    if config.json:
        print(json.dumps({**dataclasses.asdict(report), "usable": report.usable}, indent=2))
    else:
        print(render(report))
    if not report.usable:
        raise UserError(f"{config.file}: not usable: {report.why_not}")
    return report

"""What several commands ask for, and what is checked before a run folder is touched."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import transformers
from accelerate import Accelerator

import hydra_kernels
from hydra_rlhf import trackers
from hydra_rlhf.data.lengths import tokens
from hydra_rlhf.errors import UserError
from hydra_rlhf.records import check_run_dir, open_run_dir
from hydra_rlhf.rollout import encode_prompts
from hydra_rlhf.settings import required, setting

_log = logging.getLogger("hydra_rlhf")
BACKENDS = ("reference", "cpu", "triton", "cuda")
OPS = ("linear_logprob", "lora_linear", "ppo_loss", "kl_rewards", "gae", "masked_whiten")


@dataclass
class OutputConfig:
    """Where a run is written and what it runs on."""

    _argument_group_name = "output and machine"

    output_dir: str = required("run folder to write")
    overwrite: bool = setting(False, "replace the run that is in it")
    log_with: str | None = setting(
        None, "more trackers besides TensorBoard, as accelerate names them: wandb,mlflow,..."
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes a GPU where there is one")
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = setting(
        "auto", "kernels to run; one that is named runs everywhere or the command stops"
    )

    @property
    def trackers(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in (self.log_with or "").split(",") if name.strip())

    def check(self, *, resume: bool = False, reads: Sequence[str | None] = ()) -> None:
        """Raises UserError where the run could not be written or run.

        Args:
            reads: What the run starts from, files or folders: ``overwrite`` must not delete it.
        """
        check_run_dir(self.output_dir, overwrite=self.overwrite, resume=resume)
        inside = Path(self.output_dir).resolve()
        for read in reads if self.overwrite else ():
            if read and Path(read).exists() and Path(read).resolve().is_relative_to(inside):
                raise UserError(
                    f"--overwrite would delete {read}, which this run starts from: choose another "
                    "--output-dir"
                )
        trackers.check(self.trackers)
        choose_backend(self.backend)


@dataclass
class TrainingOutput(OutputConfig):
    """Of a run that can go on."""

    resume: bool = setting(
        False, "go on from the newest whole checkpoint of the run that is in output_dir"
    )


def open_shared_run_dir(accelerator: Accelerator, output: OutputConfig) -> Path:
    """``open_run_dir`` by the first process, once all have checked it and before any goes on."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        open_run_dir(
            output.output_dir, overwrite=output.overwrite, resume=getattr(output, "resume", False)
        )
    accelerator.wait_for_everyone()
    return Path(output.output_dir)


def choose_backend(name: str, ops: tuple[str, ...] = OPS) -> None:
    """Has every op run on the backend ``name``, or on the one in ``HYDRA_BACKEND`` for "auto".

    Raises:
        UserError: it cannot run one of ``ops`` here; with the reason.
    """
    if name == "auto":
        name = os.environ.get("HYDRA_BACKEND", "")
        if not name:
            _say_what_is_missing()
            return
    if name not in BACKENDS:
        raise UserError(f"no kernel backend {name!r} (known: {', '.join(BACKENDS)})")
    every = hydra_kernels.available_backends()
    for op in ops:
        if op in every and name not in every[op]:
            raise UserError(
                f"backend {name!r} cannot run {op} here: {every[op].why_not.get(name)} "
                f"(can: {', '.join(every[op])})"
            )
    os.environ["HYDRA_BACKEND"] = name


def _say_what_is_missing() -> None:
    found = hydra_kernels.available_backends("linear_logprob")
    if tuple(found) == ("reference",):
        _log.warning(
            "no kernels but the PyTorch reference run here, which is slower and takes more memory: "
            "%s",
            found.why_not["cpu"],
        )


def limits(
    overlong: str,
    model: str,
    tokenizer: Any,
    *,
    max_length: int | None,
    response_length: int = 0,
    apply_chat_template: bool = False,
) -> dict[str, Any]:
    """``max_length`` and ``overlong`` for the loaders of ``hydra_rlhf.data``.

    Args:
        overlong: What the user chose.
        model: Its context counts, where it names one.
        tokenizer: What it puts around a prompt is not the prompt's to fill.
        max_length: The user's limit.
        response_length: Tokens to leave free in the context.
        apply_chat_template: As in ``rollout.encode_prompts``.

    Raises:
        UserError: neither the user nor the model has a limit, or it leaves no room.
    """
    context = None
    with contextlib.suppress(OSError, ValueError):  # which loading the model will report
        found = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        context = getattr(found.get_text_config(), "max_position_embeddings", None)
    free = None if context is None else context - response_length
    known = [n for n in (max_length, free) if n is not None]
    if not known:
        raise UserError(f"overlong {overlong} needs max_length: {model} names no context")
    word, _ = encode_prompts(tokenizer, ["a"], apply_chat_template=apply_chat_template)
    around = word.shape[1] - len(tokens(tokenizer, "a"))
    return {"max_length": min(known) - around, "overlong": overlong}


def stopped(by: signal.Signals, saved: bool) -> str:
    """What is said of a run that a signal ended."""
    if saved:
        return f"{by.name}: saved; the same command with --resume goes on"
    return f"{by.name}: not saved; --resume goes on from the checkpoint before, if there is one"


def command_line() -> str:
    """The command as it was typed, for the run's records."""
    return " ".join(["hydra-rlhf", *sys.argv[1:]])

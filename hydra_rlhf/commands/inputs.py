"""What several commands ask for, and what is checked before a run folder is touched."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import Accelerator

import hydra_kernels
from hydra_rlhf import trackers
from hydra_rlhf.errors import UserError
from hydra_rlhf.records import check_run_dir, open_run_dir
from hydra_rlhf.settings import required, setting

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

    def check(self, *, resume: bool = False) -> None:
        """Raises UserError where the run could not be written or run."""
        check_run_dir(self.output_dir, overwrite=self.overwrite, resume=resume)
        trackers.check(self.trackers)
        choose_backend(self.backend)


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
            return
    if name not in BACKENDS:
        raise UserError(f"no kernel backend {name!r} (known: {', '.join(BACKENDS)})")
    every = hydra_kernels.available_backends()
    assert isinstance(every, dict)
    for op in ops:
        if op in every and name not in every[op]:
            raise UserError(
                f"backend {name!r} cannot run {op} here: {every[op].why_not.get(name)} "
                f"(can: {', '.join(every[op])})"
            )
    os.environ["HYDRA_BACKEND"] = name


def command_line() -> str:
    """The command as it was typed, for the run's records."""
    return " ".join(["hydra-rlhf", *sys.argv[1:]])

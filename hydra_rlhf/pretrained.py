"""Models and heads from files, with what is wrong with a file told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import patch_environment
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hydra_rlhf import hub
from hydra_rlhf.errors import UserError, first_line

REWARD_HEAD = "reward_head.safetensors"
VALUE_HEAD = "value_head.safetensors"


def load_causal_lm(
    path: str | Path, *, dtype: str | torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """``AutoModelForCausalLM.from_pretrained``, in eval mode, with a UserError in one line."""
    with (
        hub.loading("a causal language model", path, SafetensorError),
        # transformers would leave all processes but one without weights, for accelerate to fill.
        patch_environment(fsdp_cpu_ram_efficient_loading="false"),
    ):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype or "auto", trust_remote_code=trust_remote_code
        )
    return model.eval()


def head_width(causal_lm: Any) -> int:
    """Width of the trunk's output: that of the causal head's input."""
    return causal_lm.get_output_embeddings().weight.shape[1]


def new_head(width: int, device: torch.device) -> nn.Linear:
    head = nn.Linear(width, 1, bias=False, device=device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    return head


def load_head(file: Path, width: int, device: torch.device) -> nn.Linear | None:
    if not file.is_file():
        return None
    try:
        state = load_file(file)
        weight = state["weight"]
    except (OSError, KeyError, SafetensorError) as e:
        raise UserError(f"cannot read a head from {file}: {first_line(e)}") from e
    if weight.shape != (1, width):
        raise UserError(f"{file} holds a head of shape {tuple(weight.shape)}, not (1, {width})")
    head = nn.Linear(width, 1, bias="bias" in state, device=device, dtype=torch.float32)
    try:
        head.load_state_dict(state)
    except RuntimeError as e:
        raise UserError(f"cannot read a head from {file}: {first_line(e)}") from e
    return head


def save_head(head: nn.Linear, file: Path) -> None:
    state = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    save_file(state, file)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts that other processes hold, who have to ask for it too."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

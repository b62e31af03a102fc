"""Models and heads from files, with what is wrong with a file told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import patch_environment
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import cached_file

from hydra_rlhf import hub
from hydra_rlhf.errors import UserError, first_line

# In a folder of their own: vLLM and others take every safetensors file beside config.json for the
# model's weights.
REWARD_HEAD = "heads/reward_head.safetensors"
VALUE_HEAD = "heads/value_head.safetensors"
TRL_HEAD = "v_head.summary."
_WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


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


def copy_of_head(head: nn.Linear) -> nn.Linear:
    """A head of its own that says the same, its bias too: value == reward before training."""
    made = nn.Linear(
        head.in_features,
        1,
        bias=head.bias is not None,
        device=head.weight.device,
        dtype=torch.float32,
    )
    made.load_state_dict(head.state_dict())
    return made


def load_heads(path: str | Path, width: int, device: torch.device) -> dict[str, nn.Linear | None]:
    """``reward_head`` and ``value_head`` of a checkpoint, None for one that it does not have.

    A value head is also taken from a TRL checkpoint, which has it among the model's weights.

    Args:
        path: Folder or hub name.
        width: D that the heads must have.
        device: Where to.

    Raises:
        UserError: a head cannot be read, or is of another width.
    """
    heads = {
        name: load_head(head_file(path, file), width, device)
        for name, file in (("reward_head", REWARD_HEAD), ("value_head", VALUE_HEAD))
    }
    if heads["value_head"] is None and Path(path).is_dir():
        head = trl_value_head(Path(path))
        if head is not None and head.in_features != width:
            raise UserError(f"{path}: its value head is {head.in_features} wide, not {width}")
        heads["value_head"] = None if head is None else head.to(device)
    return heads


def head_file(path: str | Path, name: str) -> Path:
    """A head's file in a folder, or of a hub name's once it is fetched; it may not exist.

    Args:
        path: Folder or hub name.
        name: REWARD_HEAD or VALUE_HEAD. Folders of before it had that name have the file right
            beside the weights, where it is looked for too.
    """
    for place in (name, Path(name).name):
        found = _local_file(path, place)
        if found is not None:
            return found
    return Path(path) / name


def _local_file(path: str | Path, name: str) -> Path | None:
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    # The model itself was just loaded from there: what cannot be had is not there.
    found = cached_file(
        str(path),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


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


def trl_value_head(path: Path) -> nn.Linear | None:
    """The value head that TRL's ``AutoModelForCausalLMWithValueHead`` keeps among the weights.

    Returns:
        A float32 linear (D -> 1) on the CPU; None where there is no such head.

    Raises:
        UserError: the weights cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(path):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as weights:
                    found = {n: weights.get_tensor(n) for n in weights.keys() if TRL_HEAD in n}
            else:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                found = {name: value.clone() for name, value in state.items() if TRL_HEAD in name}
        except Exception as e:  # torch.load raises anything for a broken file
            raise UserError(f"cannot read {file}: {first_line(e)}") from e
        tensors |= {name.split(TRL_HEAD)[1]: value.float() for name, value in found.items()}
    if not tensors:
        return None
    weight = tensors.get("weight")
    if weight is None or weight.dim() != 2 or weight.shape[0] != 1:
        raise UserError(f"{path}: {TRL_HEAD}weight is not a (1, D) matrix")
    head = nn.Linear(weight.shape[1], 1, bias="bias" in tensors)
    head.load_state_dict(tensors)
    return head


def _weight_files(path: Path) -> list[Path]:
    """The files that may hold a value head: of shards those that the index names for it."""
    for name in _WEIGHT_FILES:
        file = path / name
        if not file.is_file():
            continue
        if file.suffix != ".json":
            return [file]
        try:
            shards = json.loads(file.read_text())["weight_map"].items()
            names = sorted({shard for tensor, shard in shards if TRL_HEAD in tensor})
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"cannot read {file}: {first_line(e)}") from e
        if any(Path(name).name != name for name in names):
            raise UserError(f"{file} names files outside its folder")
        return [path / name for name in names]
    return []


def save_head(head: nn.Linear, path: Path, name: str) -> None:
    """Writes ``path/name``, and removes the older one beside the weights that it stands for."""
    state = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    file = path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file)
    (path / file.name).unlink(missing_ok=True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts that other processes hold, who have to ask for it too."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def base_of(adapter: str | Path, named: str | None) -> str | None:
    """Where the base is that an adapter names.

    A relative folder is that of the command which trained it. Where it is not there from here, it
    is looked for from the folders above the adapter.
    """
    if not named or Path(named).exists() or Path(named).is_absolute():
        return named
    for above in Path(adapter).resolve().parents:
        if (above / named / "config.json").is_file():
            return str(above / named)
    return named

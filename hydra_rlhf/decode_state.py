"""What a decoding step reads and writes: keys and values a row, and the row's own numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hydra_rlhf.decodable import Unsupported


def kv_bytes(text: Any, itemsize: int) -> int:
    """Of the keys and values of one token, in every layer of a model of this configuration."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_dim * itemsize


class Prefill(Cache):
    """Hands every layer its own keys and values back and puts them into rows of the buffers."""

    def __init__(self, buffers: Buffers, rows: Tensor) -> None:
        self.layers: list = []  # transformers looks through it for kinds of layers
        self.count = 0
        self._buffers, self._rows = buffers, rows

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx != self.count:
            raise Unsupported(f"layer {layer_idx} caches out of turn")
        self.count += 1
        self._buffers.put(layer_idx, self._rows, (key_states, value_states))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0, *args) -> int:
        return 0


class Buffers(Cache):
    """Keys and values (B, heads, L, head size) of every layer, written at each row's own slot.

    A layer's are made when it first puts something, so that nothing is held twice.
    """

    def __init__(self, batch: int, length: int, device: torch.device):
        self.layers: list = []
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.length = length
        self.rows = torch.arange(batch, device=device)
        self.slot = torch.zeros_like(self.rows)  # (B,) where the next token's keys go
        self.seen = length  # how many slots attention reads

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        for buffer, new in zip(self.pairs[layer_idx], (key_states, value_states), strict=True):
            buffer[self.rows, :, self.slot] = new[:, :, 0]
        keys, values = self.pairs[layer_idx]
        return keys[:, :, : self.seen], values[:, :, : self.seen]

    def get_seq_length(self, layer_idx: int = 0, *args) -> int:
        return 0  # positions and masks are passed in, nothing is derived from it

    def put(self, layer: int, rows: Tensor, prefilled: tuple[Tensor, Tensor]) -> None:
        if layer == len(self.pairs):
            batch = len(self.rows)
            keys, values = (
                t.new_zeros((batch, t.shape[1], self.length, t.shape[3])) for t in prefilled
            )
            self.pairs.append((keys, values))
        for buffer, part in zip(self.pairs[layer], prefilled, strict=True):
            buffer[rows, :, : part.shape[2]] = part

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        return [t for pair in self.pairs for t in pair]


@dataclass
class State:
    """What a step reads and writes. B rows, T response tokens, L slots, P + T or a few more."""

    cache: Buffers
    mask: Tensor  # (B, L) added to attention scores: 0 or the dtype's lowest
    near: Tensor | None  # (B, L) the same for layers with a sliding window; None without any
    token: Tensor  # (B, 1) the last token, whose keys are not written yet
    position: Tensor  # (B, 1)
    column: Tensor  # (B, 1) of the response, where the next token goes
    finished: Tensor  # (B,)
    uniforms: Tensor  # (B, T)
    tokens: Tensor  # (B, T)
    logprobs: Tensor  # (B, T)
    sampled_logprobs: Tensor  # (B, T)
    values: Tensor | None  # (B, T)
    prefix: Tensor | None = None  # (B, L, D) what entered the first adapted block

    def outputs(self) -> dict[str, Tensor]:
        named = {n: getattr(self, n) for n in ("tokens", "logprobs", "sampled_logprobs", "values")}
        return {name: buffer for name, buffer in named.items() if buffer is not None}

    def collected(self) -> dict[str, Tensor]:
        """What a row leaves behind when it has finished."""
        return self.outputs() | ({} if self.prefix is None else {"prefix": self.prefix})

    def changing(self) -> dict[str, Tensor]:
        """Everything that a token changes besides keys and values."""
        names = ("mask", "token", "position", "column", "finished", "uniforms")
        return {**{name: getattr(self, name) for name in names}, **self.outputs()}

    def _large(self) -> list[Tensor]:
        return [*self.cache.tensors(), *([] if self.prefix is None else [self.prefix])]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and kept activations that are held now."""
        return sum(t.untyped_storage().nbytes() for t in self._large())

    def release(self) -> None:
        """Gives the memory back and keeps the tensors, which :meth:`restore` fills again."""
        for buffer in self._large():
            buffer.untyped_storage().resize_(0)

    def restore(self) -> None:
        for buffer in self._large():
            if buffer.untyped_storage().nbytes() == 0:
                buffer.untyped_storage().resize_(buffer.numel() * buffer.element_size())
                buffer.zero_()

    def rows(self, row: Tensor) -> State:
        """A copy of some rows, to choose their next token apart from the others."""
        some: dict[str, Any] = {name: buffer[row] for name, buffer in self.changing().items()}
        return replace(self, **some)

    def put_rows(self, row: Tensor, part: State) -> None:
        for name, buffer in self.changing().items():
            buffer[row] = getattr(part, name)


def new_state(
    batch: int,
    slots: int,
    tokens: int,
    device: torch.device,
    *,
    window: bool,
    values: bool,
    dtype: torch.dtype,
) -> State:
    """Zeroed buffers for ``batch`` rows of ``slots``, of which ``tokens`` may be a response's.

    ``dtype`` is that of masks. Keys, values and activations come with the first prompts.
    """

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return State(
        cache=Buffers(batch, slots, device),
        mask=zeros(batch, slots, dtype=dtype),
        near=zeros(batch, slots, dtype=dtype) if window else None,
        token=zeros(batch, 1, dtype=torch.long),
        position=zeros(batch, 1, dtype=torch.long),
        column=zeros(batch, 1, dtype=torch.long),
        finished=zeros(batch, dtype=torch.bool),
        uniforms=zeros(batch, tokens, dtype=torch.float32),
        tokens=zeros(batch, tokens, dtype=torch.long),
        logprobs=zeros(batch, tokens, dtype=torch.float32),
        sampled_logprobs=zeros(batch, tokens, dtype=torch.float32),
        values=zeros(batch, tokens, dtype=torch.float32) if values else None,
    )


def widen(ids: Tensor, mask: Tensor, missing: int) -> tuple[Tensor, Tensor]:
    """Prompts and their masks with ``missing`` padded columns more on the left."""
    return tuple(torch.nn.functional.pad(t, (missing, 0)) for t in (ids, mask))  # type: ignore


def prefill_masks(mask: Tensor, dtype: torch.dtype, window: int | None) -> tuple[Tensor, Tensor]:
    """(B, 1, P, P) to add to attention scores: for full and for sliding layers."""
    P = mask.shape[1]
    slots = torch.arange(P, device=mask.device)
    lowest = torch.finfo(dtype).min
    seen = (slots <= slots[:, None]) & (mask != 0)[:, None, None]
    # Padding sees itself, for some kernels give NaN where nothing is seen; nobody reads what it
    # sees, but 0 times NaN would be NaN.
    seen = seen | (slots == slots[:, None])
    full = torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, lowest)
    if window is None or window >= P:
        return full, full
    return full, full.masked_fill(slots <= slots[:, None] - window, lowest)

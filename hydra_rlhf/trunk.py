"""Running part of a transformers decoder with its own forward: prefix, tail, checkpointed.

A decoder of transformers (its *trunk*) embeds the tokens, makes masks and positions, and calls the
blocks in a list one after another. To run some of the blocks, this module makes a shallow copy of
the trunk whose list has the same length but stand-ins in the place of the rest: one that records
its input, one that puts a recorded input back, one that passes it on. So embeddings, learned
positions, scalings, masks, rotary tables and final norm stay the family's own code and there is
nothing to neutralise; and since a copy lives for one call and shares every parameter, two threads
may run different parts of one trunk at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Prefix:
    """Activations that enter block ``layer``, the same for every role.

    Attributes:
        hidden: (B, L, D), without gradient; on the trunk's device or, offloaded, on the CPU.
        layer: Index of the first block that still has to run.
        as_tuple: Whether the family's blocks return a tuple (transformers before 4.54 or so).
    """

    hidden: Tensor
    layer: int
    as_tuple: bool

    @property
    def nbytes(self) -> int:
        return self.hidden.numel() * self.hidden.element_size()

    def rows(self, index: Tensor | slice) -> Prefix:
        """The prefix of some sequences; ``index`` as for a tensor's first dimension."""
        if isinstance(index, Tensor):
            index = index.to(self.hidden.device)
        return replace(self, hidden=self.hidden[index])

    def repeat(self, copies: int) -> Prefix:
        """The prefix of ``copies`` batches one after the other, as one batch."""
        return replace(self, hidden=self.hidden.repeat(copies, 1, 1))

    @staticmethod
    def join(parts: list[Prefix]) -> Prefix:
        """The prefixes of some batches as that of one."""
        if len(parts) == 1:
            return parts[0]
        return replace(parts[0], hidden=torch.cat([part.hidden for part in parts]))

    def offload(self) -> Prefix:
        """The same on the host, pinned where a GPU will fetch it."""
        host = self.hidden.cpu()
        if self.hidden.is_cuda:
            host = host.pin_memory()
        return replace(self, hidden=host)


def trunk_of(causal_lm: Any) -> Any:
    """The decoder of a causal LM without its head."""
    found = getattr(causal_lm, causal_lm.base_model_prefix, None)
    # Gemma 3's, in transformers 4.56.0, is not under the name that its class says.
    return causal_lm.model if found is None else found


def blocks(trunk: Any) -> nn.ModuleList:
    """The list of decoder blocks inside ``trunk``.

    Raises:
        NotImplementedError: there is no list as long as ``config.num_hidden_layers``.
    """
    return _find_blocks(trunk)[1]


def blocks_name(trunk: Any) -> str:
    """Dotted name of the list of blocks, such as ``layers`` or ``decoder.layers``."""
    return _find_blocks(trunk)[0]


def _find_blocks(trunk: Any) -> tuple[str, nn.ModuleList]:
    count = trunk.config.get_text_config().num_hidden_layers
    for name, module in trunk.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise NotImplementedError(f"{type(trunk).__name__} has no list of {count} decoder blocks")


def compute_prefix(trunk: nn.Module, layer: int, **inputs: Tensor) -> Prefix:
    """Runs blocks 0 to ``layer - 1`` without gradient; ``inputs`` go to the trunk's forward."""
    if layer < 1:
        raise ValueError(f"compute_prefix: layer must be at least 1, got {layer}")
    real = blocks(trunk)
    record = _Recorder(real[layer])
    last = _ObserveForm(real[layer - 1], record)
    stand_ins = [
        *real[: layer - 1],
        last,
        record,
        *(_PassOn(block, record) for block in real[layer + 1 :]),
    ]
    with torch.no_grad():
        _with_blocks(trunk, stand_ins)(use_cache=False, **inputs)
    assert record.hidden is not None
    return Prefix(record.hidden, layer, record.as_tuple)


def run(
    trunk: nn.Module,
    *,
    prefix: Prefix | None = None,
    recompute: str | None = None,
    context: Callable[[], AbstractContextManager] | None = None,
    **inputs: Tensor,
) -> Tensor:
    """The trunk's last hidden state (B, L, D).

    Args:
        trunk: The decoder, as ``AutoModel`` gives it.
        prefix: Start from these activations instead of block 0.
        recompute: None, "reentrant" or "non-reentrant": checkpoint each block that runs. Works in
            eval mode too, where transformers' own checkpointing is silently off.
        context: Entered around each checkpointed block, in forward and again when backward
            recomputes it, so that both see the same adapter ids.
        inputs: To the trunk's forward: input_ids, attention_mask, position_ids.
    """
    if prefix is None and recompute is None:
        return trunk(use_cache=False, **inputs).last_hidden_state
    parts: list[nn.Module] = list(blocks(trunk))
    start = 0
    if prefix is not None:
        start = prefix.layer
        form = _Form(prefix.as_tuple)
        device = inputs["input_ids"].device
        hidden = prefix.hidden.to(device, non_blocking=True)
        if recompute == "reentrant" and torch.is_grad_enabled():
            hidden = hidden.detach().requires_grad_()
        # The last stand-in puts the activations back, so that the first ones cost nothing.
        parts[: start - 1] = [_PassOn(block, form) for block in parts[: start - 1]]
        parts[start - 1] = _PutBack(parts[start - 1], form, hidden)
    if recompute is not None:
        reentrant = recompute == "reentrant"
        first = start == 0
        for i in range(start, len(parts)):
            if isinstance(parts[i], StandIn):
                continue  # has nothing to recompute
            parts[i] = _Recompute(
                parts[i], reentrant, context, needs_grad=first and i == 0, dropout=trunk.training
            )
    return _with_blocks(trunk, parts)(use_cache=False, **inputs).last_hidden_state


def flops(trunk: Any, first: int, last: int, batch: int, length: int) -> int:
    """Floating-point operations of blocks ``first`` to ``last - 1`` in one forward pass.

    Two for each weight of a matrix and token, and 4 L D a token for attention's two products,
    without the factor 1/2 that a causal kernel may save. Of experts those that a token is sent to.
    """
    total = 0
    config = trunk.config.get_text_config()
    width = config.hidden_size
    head_dim = getattr(config, "head_dim", None)
    if head_dim:
        width = head_dim * config.num_attention_heads
    for block in blocks(trunk)[first:last]:
        weights = sum(
            _multiplied(name, p, config)
            for name, p in block.named_parameters()
            if "lora_" not in name
        )
        total += batch * length * (2 * weights + 4 * length * width)
    return total


def _multiplied(name: str, parameter: Tensor, config: Any) -> int:
    """How many of a parameter's numbers a token is multiplied by."""
    if parameter.dim() < 2 or name.endswith("bias"):
        return 0
    used = getattr(config, "num_experts_per_tok", None)
    if ".experts." not in name or used is None:
        return parameter.numel()
    if parameter.dim() == 3:  # all experts in one
        return parameter.numel() * used // parameter.shape[0]
    counts = (getattr(config, key, None) for key in ("num_local_experts", "num_experts"))
    count = next((c for c in (*counts, getattr(config, "n_routed_experts", None)) if c), used)
    return parameter.numel() * used // count


def live_width(trunk: Any) -> int:
    """Numbers a token that a block holds at its widest in a pass without gradient.

    The residual and its norm, and three outputs of the widest matrix: a gated MLP's two and their
    product, of which a plain MLP or attention holds no more.
    """
    matrices = [p for p in blocks(trunk)[-1].parameters() if p.dim() == 2]
    return 2 * trunk.config.get_text_config().hidden_size + 3 * max(max(p.shape) for p in matrices)


def _with_blocks(trunk: Any, parts: list[nn.Module]) -> nn.Module:
    """A shallow copy of ``trunk``, sharing everything but the list of blocks."""
    *owners, last = blocks_name(trunk).split(".")
    copy = root = _shallow(trunk)
    for name in owners:
        child = _shallow(copy._modules[name])
        copy._modules[name] = child
        copy = child
    copy._modules[last] = nn.ModuleList(parts)
    return root


def _shallow(module: Any) -> nn.Module:
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_modules"] = dict(module._modules)
    return copy


@dataclass
class _Form:
    """Whether a block returns its hidden state alone or first in a tuple."""

    as_tuple: bool = False


class StandIn(nn.Module):
    """Takes a block's place in the list; what the trunk asks of the block, the block answers."""

    def __init__(self, block: nn.Module, form: _Form | StandIn | None = None):
        super().__init__()
        # Past nn.Module's registration, so that the block is not a child in two places.
        self.__dict__["block"] = block
        self.__dict__["form"] = form

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def answer(self, hidden: Tensor):
        return (hidden,) if self.form.as_tuple else hidden


class _PassOn(StandIn):
    def forward(self, hidden_states: Tensor, *args, **kwargs):
        return self.answer(hidden_states)


class _Recorder(StandIn):
    """Keeps what enters it."""

    def __init__(self, block: nn.Module):
        super().__init__(block)
        self.__dict__["form"] = self
        self.hidden: Tensor | None = None
        self.as_tuple = False

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        self.hidden = hidden_states
        return self.answer(hidden_states)


class _ObserveForm(StandIn):
    """Runs the block and tells the recorder the form of its answer."""

    def forward(self, *args, **kwargs):
        out = self.block(*args, **kwargs)
        self.form.as_tuple = isinstance(out, tuple)
        return out


class _PutBack(StandIn):
    def __init__(self, block: nn.Module, form: _Form, hidden: Tensor):
        super().__init__(block, form)
        self.hidden = hidden

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        return self.answer(self.hidden)


class _Recompute(StandIn):
    """Runs the block under torch's activation checkpoint."""

    def __init__(
        self,
        block: nn.Module,
        reentrant: bool,
        context: Callable[[], AbstractContextManager] | None,
        needs_grad: bool,
        dropout: bool,
    ):
        super().__init__(block)
        self.reentrant = reentrant
        self.context = context
        self.needs_grad = needs_grad
        self.dropout = dropout

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        # The reentrant kind gives the block's parameters gradients only if an input asks for one.
        if self.needs_grad and self.reentrant and torch.is_grad_enabled():
            if not hidden_states.requires_grad:
                hidden_states = hidden_states.detach().requires_grad_()
        call = functools.partial(self._call, **kwargs)
        return checkpoint(
            call,
            hidden_states,
            *args,
            use_reentrant=self.reentrant,
            preserve_rng_state=self.dropout,
        )

    def _call(self, hidden_states: Tensor, *args, **kwargs):
        if self.context is None:
            return self.block(hidden_states, *args, **kwargs)
        with self.context():
            return self.block(hidden_states, *args, **kwargs)

"""What running a model would hold: bytes over time, of blocks that are alike from one run.

A ledger under the dispatcher adds every storage when it is made and takes it off when nothing holds
it any more. Of a row of decoder blocks that are alike it sees the first two run. What a block holds
at its worst moment and leaves behind, in forward and in backward, depends on the block, on what it
is given and on the block before it, so each of the others does what the second one did, and its
part of the time line is put in from there: exact, and as fast as if the model had few layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from hydra_rlhf.trunk import StandIn

# Of which pass, whether of its backward, and of which block; None for what is between.
_Label = tuple[int, bool, int]


class NotAlike(Exception):
    """Blocks that look alike are not run alike: all of them have to run."""


@dataclass
class _Part:
    """A stretch of the time line: how far it rises above its beginning, and where it ends."""

    rise: int
    net: int


@dataclass
class _Pass:
    """One walk through the blocks: the block that runs now, and those left out before the next."""

    number: int
    layer: int
    left_out: list[tuple[int, int]] = field(default_factory=list)  # (block, its twin)


class Ledger(TorchDispatchMode):
    """Counts the bytes of storages made inside it that are still held, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self._fresh: dict[Any, bool] = {}  # ops -> whether they make one tensor of their own
        self._outcomes: dict[tuple, tuple] = {}
        self._passes = 0
        self._depth = 0
        self.restart()

    def restart(self, live: int = 0) -> None:
        self.live = self._start = self._highest = self._from = live
        self._parts: list[tuple[_Label | None, _Part | None]] = []
        self._pass: _Pass | None = None
        self._known: Any = WeakIdKeyDictionary()
        self._round = object()

    @property
    def peak(self) -> int:
        """The most that was held, blocks that did not run included."""
        done = {label: part for label, part in self._parts if part is not None}
        held = peak = self._start
        for label, part in self._parts:
            part = part or done[label]
            peak = max(peak, held + part.rise)
            held += part.net
        return max(peak, held + self._highest - self._from)

    def __enter__(self) -> Ledger:
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._depth -= 1
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Views and in-place results share a storage that is there already.
        before = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        out = self._outcome(func, args, kwargs)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in before and storage not in self._known:
                self._add(storage)
        return out

    def _outcome(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What ``func`` gives; remembered, since its shapes take torch long on the meta device."""
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            # Which has no answer there: all of a mask count.
            return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.long)
        if func not in self._fresh:
            schema = func._schema
            one = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
            aliases = schema.is_mutable or any(r.alias_info is not None for r in schema.returns)
            self._fresh[func] = one and not aliases
        if not self._fresh[func]:
            return func(*args, **kwargs)
        key = (func, _described(args), _described(kwargs))
        if key not in self._outcomes:
            out = func(*args, **kwargs)
            if not out.is_meta:
                return out
            self._outcomes[key] = (out.shape, out.stride(), out.dtype)
            return out
        shape, stride, dtype = self._outcomes[key]
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    def _add(self, storage: Any) -> None:
        size = storage.nbytes()
        self._known[storage] = weakref.finalize(storage, self._free, size, self._round)
        self.live += size
        self._highest = max(self._highest, self.live)

    def _free(self, size: int, round_: object) -> None:
        if round_ is self._round:
            self.live -= size

    # Blocks

    def enter(self, layer: int, hidden: Tensor) -> None:
        """A block begins its forward pass on ``hidden``."""
        if self._elsewhere():
            return
        now = self._go_on(layer)
        left_out, now.left_out = now.left_out, []
        if hidden.requires_grad:
            round_ = self._round

            def end_of_backward(grad: Tensor) -> None:
                if round_ is not self._round:
                    return
                self._cut((now.number, True, layer))
                self._parts += [((now.number, True, twin), None) for _, twin in left_out[::-1]]

            hidden.register_hook(end_of_backward)

    def leave_out(self, layer: int, twin: int) -> None:
        """A block does not run; ``twin`` did, in this pass, after another one like it."""
        if self._elsewhere():
            return
        now = self._go_on(layer)
        now.left_out.append((layer, twin))
        self._parts.append(((now.number, False, twin), None))

    def _elsewhere(self) -> bool:
        """Not counting, or in a backward pass, which runs checkpointed blocks once more."""
        return not self._depth or torch._C._current_graph_task_id() != -1

    def _go_on(self, layer: int) -> _Pass:
        now = self._pass
        if now is None or layer <= now.layer:
            self._cut(None)
            self._passes += 1
            now = self._pass = _Pass(self._passes, layer)
        else:
            # Of blocks that were left out it is empty.
            self._cut(None if now.left_out else (now.number, False, now.layer))
            now.layer = layer
        return now

    def _cut(self, label: _Label | None) -> None:
        """Ends the part that has this label, and begins the next one."""
        self._parts.append((label, _Part(self._highest - self._from, self.live - self._from)))
        self._highest = self._from = self.live


def _described(value: Any) -> Any:
    """To be compared: tensors by what shapes follow from, numbers by their type too."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((name, _described(item)) for name, item in value.items())
    return type(value), value


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


# What of a block its bytes do not depend on: which one it is, and where masks of a given shape are
# added to scores, how far a token sees.
_WHICH = {"layer_idx", "layer_id"}
_HOW_FAR = {"sliding_window", "is_sliding", "attention_type", "layer_type", "window_size"}
_PLAIN = (int, float, bool, str, type(None), torch.dtype)


def put_twins(layers: nn.ModuleList, ledger: Ledger, *, masked: bool) -> None:
    """Leaves out blocks that are like one before them, as is the block that each of them follows.

    Args:
        layers: A decoder's list, changed in place.
        ledger: Is told of every block.
        masked: Whether attention is of one kind, whose reach the mask alone decides.

    A pass over them raises :class:`NotAlike` where such a block is given other shapes.
    """
    twins = _twins(list(layers), _WHICH | _HOW_FAR if masked else _WHICH)
    told = [_Told(block, i, ledger) for i, block in enumerate(layers)]
    for i, twin in twins.items():
        layers[i] = _LeftOut(layers[i], told[i], told[twin])


def _twins(blocks: list[nn.Module], ignored: set[str]) -> dict[int, int]:
    """Block to be left out -> an earlier one that is run and is the same to the byte."""
    kinds: list[Any] = []
    trained = False  # something below, so that its input has a gradient
    for block in blocks:
        kinds.append((trained, _kind(block, ignored)))
        trained = trained or any(p.requires_grad for p in block.parameters())
    # They follow and are followed by what is no block.
    kinds[0], kinds[-1] = ("first", kinds[0]), ("last", kinds[-1])
    twins: dict[int, int] = {}
    for i in range(1, len(kinds)):
        for j in range(1, i):
            if j not in twins and kinds[j - 1 : j + 1] == kinds[i - 1 : i + 1]:
                twins[i] = j
                break
    # A block that is run has to follow one like the block before it.
    for i in range(len(kinds) - 1, 0, -1):
        if i not in twins:
            before = max(j for j in range(i) if j not in twins)
            if kinds[before] != kinds[i - 1]:
                del twins[i - 1]
    return twins


def _kind(block: nn.Module, ignored: set[str]) -> list:
    """What is the same in blocks that hold the same number of bytes."""
    found = []
    for name, module in block.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes = [(n, t.shape, t.dtype, t.requires_grad) for n, t in tensors]
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, _PLAIN) and key not in ignored
        }
        found.append((name, type(module), shapes, plain))
    return found


class _Told:
    """Tells the ledger when a block is run; remembers what it was given, and how it answered."""

    def __init__(self, block: nn.Module, layer: int, ledger: Ledger):
        self.layer, self.ledger = layer, ledger
        self.given: list = []
        self.as_tuple = False
        block.register_forward_pre_hook(self._before, with_kwargs=True)
        block.register_forward_hook(self._after)

    def _before(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        self.given = _shapes_of(args, kwargs)
        self.ledger.enter(self.layer, args[0] if args else kwargs["hidden_states"])

    def _after(self, block: nn.Module, args: tuple, out: Any) -> None:
        self.as_tuple = isinstance(out, tuple)


class _LeftOut(StandIn):
    """Hands on what it is given. The block stays its child, whose parameters count."""

    def __init__(self, block: nn.Module, told: _Told, twin: _Told):
        super().__init__(block)
        self._modules["block"] = block
        self.__dict__["told"], self.__dict__["twin"] = told, twin

    def forward(self, *args, **kwargs):
        if _shapes_of(args, kwargs) != self.twin.given:
            raise NotAlike(f"blocks {self.twin.layer} and {self.told.layer} are given other shapes")
        self.told.ledger.leave_out(self.told.layer, self.twin.layer)
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if self.twin.as_tuple else hidden


def _shapes_of(args: tuple, kwargs: dict) -> list:
    return [
        (leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else type(leaf)
        for leaf in tree_leaves((args, kwargs))
    ]

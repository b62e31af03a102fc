"""Layers of one parent that read the same input, q, k and v or gate and up, run as one group.

The first that is called runs :func:`hydra_kernels.lora_linear_group` for all of them and puts the
others' outputs by; each of them takes its own where it is asked for what was computed, and computes
for itself where not. So x is read once for the shrink and once for all dA, and dX is summed in one
buffer. Nearly all of that is won in the backward pass, so without autograd, and for a small x, each
layer runs alone; on a CPU the outputs are the same bit for bit.

Who reads the same input is read off the source of the parent's own ``forward``: calls of
``self.name(variable)`` with one variable, each the only mention of its layer, in simple statements
that follow one another. Only that code leads a group, so a layer that is called from elsewhere
computes nothing that nobody asks for, and whether a layer is grouped depends on no history:
recomputation under activation checkpointing saves what the forward pass saved.

Two differences are left to see, both of them errors that autograd raises. The gradients of a group
are computed together, so after a backward pass through one layer's output alone, another's needs
``retain_graph``; and they need the weights of all the layers as they were at the first one's call.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType

import torch
from torch import Tensor, nn

from hydra_kernels.ops.lora_linear import gated_linear_group
from hydra_kernels.peft.layer import FusedLinear, Ready, is_bare

# Elements of x below which a group's bookkeeping, about 20 us of host time with a backward pass,
# costs more than it saves, about 2 ns for each; measured on a CPU.
LEAST_NUMEL = 2**15
_FRAMES = 8  # from a group up to the parent's forward there are five or six


# A tensor, its version, where its data is and whether it asks for a gradient.
_Seen = tuple[Tensor, int, int, bool]


@dataclass
class _PutBy:
    """Outputs of a group that its members have not taken yet, and what they were computed from."""

    group: Group
    x: Tensor
    x_version: int
    ids: Tensor | None
    ids_version: int
    names: list[str]
    modes: tuple
    outputs: dict[int, tuple[Tensor, list[_Seen], list[float | Tensor]]]


class _Slot(threading.local):
    """What the running thread's latest group has put by; one at a time, so that little is held."""

    put_by: _PutBy | None = None


_slot = _Slot()


class Group:
    """Two or more fused layers, in the order in which their parent's forward calls them."""

    __slots__ = ("__weakref__", "code", "members")

    def __init__(self, code: CodeType, members: Sequence[FusedLinear]) -> None:
        self.code = code
        # Weak: the layers are their parent's, and a cycle would keep a deleted model's memory.
        self.members = tuple(weakref.ref(member) for member in members)

    def __deepcopy__(self, memo: dict) -> None:
        return None  # the layers of a copy are grouped by fuse, or when it is first given ids

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _no_group, ()

    def forward(
        self,
        layer: FusedLinear,
        x: Tensor,
        names: list[str],
        owners: Sequence[int],
        ids: Tensor | None,
        index: Mapping[str, int] | None,
        ready: Ready,
        num_adapters: int,
    ) -> Tensor | None:
        """The layer's output; None where it has to be computed for itself."""
        put_by = _slot.put_by
        if put_by is not None and put_by.group is self:
            y = _take(put_by, layer, x, names, ids, ready)
            if y is not None:
                return y
        if (
            layer is not self.members[0]()
            or x.numel() < LEAST_NUMEL
            or (ids is not None and ids is not layer._current.now.ids)  # made for this call alone
            or x.is_inference()  # without versions a change of x would not be seen
            or not self._called_by_parent()
        ):
            return None
        members = [ref() for ref in self.members]
        found = [ready, *(self._ready(member, x, names, index) for member in members[1:])]
        if None in found:
            return None
        _, weights, biases, lora_a, lora_b, scales = zip(*found, strict=True)
        if any(not isinstance(s, float | int) for each in scales for s in each) or not _same_dtypes(
            lora_a
        ):
            return None
        _slot.put_by = None  # what an exception or a changed input left, before more is allocated
        ys = gated_linear_group(
            x, weights, biases, lora_a, lora_b, scales, [owners] * len(members), ids,
            num_adapters=num_adapters,
        )  # fmt: skip
        _slot.put_by = _PutBy(
            self,
            x,
            x._version,
            ids,
            -1 if ids is None else ids._version,
            names,
            _modes(x),
            {
                id(member): (y, _seen(each), each[-1])
                for member, y, each in zip(members[1:], ys[1:], found[1:], strict=True)
            },
        )
        return ys[0]

    def _ready(
        self,
        member: FusedLinear | None,
        x: Tensor,
        names: list[str],
        index: Mapping[str, int] | None,
    ) -> Ready | None:
        """What the member's product takes, None where it would not run as the leader's does."""
        if (
            type(member) is not FusedLinear
            or member._group is not self
            or member._disable_adapters
            or member.merged_adapters
            or not is_bare(member)
            or member.adapters(index)[0] != names
        ):
            return None
        ready = member.ready(x, names)
        return None if ready is None or ready[0] > 0.0 else ready

    def _called_by_parent(self) -> bool:
        frame = sys._getframe(2)
        for _ in range(_FRAMES):
            if frame is None or frame.f_code is self.code:
                break
            frame = frame.f_back  # type: ignore[assignment]
        return frame is not None and frame.f_code is self.code


def _no_group() -> None:
    return None


def _take(
    put_by: _PutBy,
    layer: FusedLinear,
    x: Tensor,
    names: list[str],
    ids: Tensor | None,
    ready: Ready,
) -> Tensor | None:
    found = put_by.outputs.get(id(layer))
    if (
        found is None
        or x is not put_by.x
        or x._version != put_by.x_version
        or ids is not put_by.ids
        or (ids is not None and ids._version != put_by.ids_version)
        or names != put_by.names
        or _modes(x) != put_by.modes
    ):
        return None
    y, seen, scales = found
    tensors = _tensors(ready)
    if (
        any(
            t is not then
            or t._version != version
            or t.data_ptr() != address
            or t.requires_grad != wanted
            for t, (then, version, address, wanted) in zip(tensors, seen, strict=True)
        )
        or ready[-1] != scales
    ):
        return None
    del put_by.outputs[id(layer)]
    if not put_by.outputs:
        _slot.put_by = None
    return y


def _tensors(ready: Ready) -> list[Tensor]:
    _, weight, bias, lora_a, lora_b, _ = ready
    return [weight, *lora_a, *lora_b] if bias is None else [weight, bias, *lora_a, *lora_b]


def _seen(ready: Ready) -> list[_Seen]:
    return [(t, t._version, t.data_ptr(), t.requires_grad) for t in _tensors(ready)]


def _modes(x: Tensor) -> tuple:
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return torch.is_grad_enabled(), autocast


def _same_dtypes(lora_a: Sequence[Sequence[Tensor]]) -> bool:
    dtype = lora_a[0][0].dtype
    return all(each[0].dtype == dtype for each in lora_a)


def group_siblings(model: nn.Module) -> None:
    """Groups the fused layers of ``model`` anew, wherever their parents' forwards allow it."""
    found = []
    for parent in model.modules():
        if isinstance(parent, FusedLinear):
            parent.__dict__.pop("_group", None)
            continue
        if not any(type(child) is FusedLinear for child in parent.children()):
            continue
        forward = inspect.unwrap(type(parent).forward)
        if not isinstance(forward, FunctionType):
            continue
        for run in _called_alike(forward):
            members = [parent._modules.get(name) for name in run]
            # A Conv1D's weight is transposed, and so another tensor, at every call.
            fused = [
                member
                for member in members
                if type(member) is FusedLinear and type(member.base_layer) is nn.Linear
            ]
            if len(fused) > 1 and len({member.in_features for member in fused}) == 1:
                found.append((forward.__code__, fused))
    times = Counter(id(member) for _, members in found for member in members)
    for code, members in found:
        if all(times[id(member)] == 1 for member in members):  # none is two parents' child
            group = Group(code, members)
            for member in members:
                member._group = group


@functools.cache
def _called_alike(forward: FunctionType) -> list[tuple[str, ...]]:
    """Names of the layers that a forward calls on one and the same variable, in order."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return []
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return []
    owner = function.args.args[0].arg
    mentions = Counter(
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and _is_name(node.value, owner)
    )
    done: list[list[str]] = []
    open_runs: dict[str, list[str]] = {}  # by the variable
    for statement in function.body:
        simple = isinstance(
            statement, ast.Assign | ast.AnnAssign | ast.Expr | ast.Return
        ) and not any(isinstance(node, ast.NamedExpr) for node in ast.walk(statement))
        calls = _calls(statement, owner) if simple else []
        for name, variable in calls:
            if mentions[name] == 1:
                open_runs.setdefault(variable, []).append(name)
        rebound = {
            node.id
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        }
        for variable in [v for v in open_runs if v in rebound or not simple]:
            done.append(open_runs.pop(variable))
    done.extend(open_runs.values())
    return [tuple(run) for run in done if len(run) > 1]


# What evaluates all of its parts, from left to right.
_IN_ORDER = (
    ast.Assign,
    ast.AnnAssign,
    ast.Attribute,
    ast.BinOp,
    ast.Call,
    ast.Expr,
    ast.List,
    ast.Return,
    ast.Starred,
    ast.Subscript,
    ast.Tuple,
    ast.UnaryOp,
    ast.keyword,
)


def _calls(node: ast.AST, owner: str) -> list[tuple[str, str]]:
    """``(name, variable)`` of each ``owner.name(variable)`` that is certain to be called."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and _is_name(node.func.value, owner)
        and len(node.args) == 1
        and isinstance(node.args[0], ast.Name)
        and not node.keywords
    ):
        return [(node.func.attr, node.args[0].id)]
    if not isinstance(node, _IN_ORDER):
        return []
    return [call for child in ast.iter_child_nodes(node) for call in _calls(child, owner)]


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name

"""Instructions of csrc/cpu/replay.cpp over tensors, and where in memory these lie.

Every tensor is a storage, an offset and strides, so a view costs nothing: it is the same storage
seen otherwise. Storages that the function made itself live in one arena, each for as long as it is
read; all others stay where they are.

Numbers are computed in float32. What the function made in bfloat16 lies in the arena as float32, so
that a replay rounds less than the function did; bfloat16 weights, keys and values stay as they are.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Opcodes, map operations and map types: as in csrc/cpu/replay.cpp.
LINEAR, LINEAR_T, MAP, MEAN, LAYER_NORM, SOFTMAX, GATHER, PUT, ATTENTION, DRAW = range(10)
SUM, TOP_K, PICK, EXPERTS = range(10, 14)
_MAPS = (
    "copy neg square cube sqrt rsqrt exp tanh sigmoid silu relu gelu gelu_tanh cos sin add sub mul "
    "div max min floor log"
).split()
MAP_OPS = {name: number for number, name in enumerate(_MAPS)}
_INT_MAPS = ("copy", "add", "sub", "mul")
FLOAT, INT, INT_TO_FLOAT, BF16_TO_FLOAT = range(4)

# Below these an instruction is quicker on one thread than shared: a meeting of threads costs as
# much as a few thousand multiply-adds.
SHARED_PRODUCTS = 1 << 14
SHARED_ELEMENTS = 1 << 13
_LINE = 64  # bytes of a cache line, which no two storages share


class NotReplayable(Exception):
    """No instruction does what the function did; the message says what."""


class Node(NamedTuple):
    op: Any
    args: tuple
    kwargs: dict
    out: Any


@dataclass
class Program:
    """Instructions as integers; a storage is slot i + 1 of the table, the arena slot 0.

    Attributes:
        words: The instructions one after another.
        count: How many.
        storages: A tensor in each storage that is not of the arena.
        arena: Bytes.
    """

    words: list[int]
    count: int
    storages: list[Tensor]
    arena: int


class At(NamedTuple):
    """Where a tensor begins."""

    storage: int
    offset: int  # bytes


NOWHERE = At(-1, 0)


class Picked(NamedTuple):
    """Matrices that an index takes from many, read where they lie and never copied."""

    copies: Tensor  # (S, *, *) as the function had them
    matrices: Tensor  # (E, *, *)
    ids: Tensor  # (S,)


@dataclass
class _Instruction:
    opcode: int
    shared: bool
    words: list[int | At]
    touched: set[int] = field(default_factory=set)


class Lowering:
    """The instructions so far, and which storages they touch."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self.instructions: list[_Instruction] = []
        self.made: dict[int, int] = {}  # storages that the function made, and their bytes
        self.outside: dict[int, Tensor] = {}  # all others
        self.constants: set[int] = set()  # storages that the function made and nothing writes to
        self.seen_as: dict[
            int, tuple[Tensor, int]
        ] = {}  # casts: of what, and first element's shift
        self.picked: dict[int, Picked] = {}
        self.kept: list[Tensor] = []
        self.results = {_storage(t) for t in outputs}

    def is_view(self, node: Node) -> bool:
        """Whether ``node`` only looks at its inputs otherwise."""
        if node.op._schema.is_mutable:
            return False
        outs = [t for t in tree_leaves(node.out) if isinstance(t, Tensor)]
        ins = {_storage(t) for t in tree_leaves((node.args, node.kwargs)) if isinstance(t, Tensor)}
        return bool(outs) and all(_storage(t) in ins for t in outs)

    # ---- operands

    def at(self, tensor: Tensor | None) -> At:
        if tensor is None:
            return NOWHERE
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise NotReplayable(f"a tensor on {tensor.device}, {tensor.layout}")
        if tensor.numel() == 0:
            raise NotReplayable("an empty tensor")
        storage = _storage(tensor)
        if storage in self.picked:
            raise NotReplayable("matrices taken by an index for more than a product")
        wide = self.is_float(tensor)
        offset = int(tensor.storage_offset())
        if storage in self.seen_as:
            tensor, shift = self.seen_as[storage]
            storage, offset = _storage(tensor), offset + shift
        if storage not in self.made:
            self.outside.setdefault(storage, tensor)
        return At(storage, offset * (4 if wide else tensor.element_size()))

    def is_float(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` lies in memory as float32."""
        if tensor.dtype == torch.bfloat16:
            return _storage(tensor) in self.made or _storage(tensor) in self.seen_as
        return tensor.dtype == torch.float32

    def check_float(self, tensor: Tensor) -> None:
        if not self.is_float(tensor):
            raise _not_covered(tensor)

    def in_halves(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` lies in memory as bfloat16 and not as float32."""
        if self.is_float(tensor):
            return False
        if tensor.dtype != torch.bfloat16:
            raise _not_covered(tensor)
        return True

    def makes(self, tensor: Tensor) -> Tensor:
        """Says that the function made ``tensor``, in a storage of its own."""
        if tensor.numel() and _storage(tensor) not in self.results:
            wide = 2 if tensor.dtype == torch.bfloat16 else 1
            self.made[_storage(tensor)] = wide * tensor.untyped_storage().nbytes()
        return tensor

    def cast(self, out: Tensor, tensor: Tensor) -> bool:
        """Sees ``out`` as ``tensor``, of which it is a cast, where no number changes by it."""
        if (
            not self.is_float(tensor)
            or out.dtype not in (torch.float32, torch.bfloat16)
            or out.stride() != tensor.stride()
            or _storage(out) in self.results
        ):
            return False
        base, shift = self.seen_as.get(_storage(tensor), (tensor, 0))
        shift += int(tensor.storage_offset()) - int(out.storage_offset())
        self.seen_as[_storage(out)] = base, shift
        return True

    def writes(self, tensor: Tensor) -> Tensor:
        """Says that the function writes to ``tensor``, which was there before."""
        storage = _storage(tensor)
        if storage in self.constants:  # it would not be made anew
            raise NotReplayable("a write to a constant")
        read = [base for base, _ in self.seen_as.values()]
        for picked in self.picked.values():
            read += [picked.matrices, picked.ids]
        if storage in self.seen_as or storage in {_storage(t) for t in read}:
            raise NotReplayable("a write to what is read later as it was")
        return tensor

    def floats(self, tensor: Tensor) -> Tensor:
        """``tensor`` in float32, by an instruction where it is something else."""
        if self.is_float(tensor):
            return tensor
        if tensor.dtype not in (torch.int64, torch.bfloat16):
            raise _not_covered(tensor)
        wide = self.new(tensor.shape)
        self.map("copy", wide, tensor)
        return wide

    def new(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype)
        self.kept.append(tensor)  # no other tensor gets its address
        return self.makes(tensor)

    def contiguous(self, tensor: Tensor) -> Tensor:
        tensor = self.floats(tensor)
        if tensor.is_contiguous():
            return tensor
        copy = self.new(tensor.shape)
        self.map("copy", copy, tensor)
        return copy

    def matrix(self, tensor: Tensor) -> tuple[Tensor, int, int]:
        """A tensor (*, K) as rows: itself or a copy, how many, and the distance between two."""
        tensor = self.floats(tensor)
        rows = math.prod(tensor.shape[:-1])
        sizes, (strides,) = collapsed(tensor.shape[:-1], [tensor.stride()[:-1]])
        if len(sizes) <= 1 and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1):
            return tensor, rows, strides[0] if sizes else tensor.shape[-1]
        copy = self.new(tensor.shape)
        self.map("copy", copy, tensor)
        return copy, rows, tensor.shape[-1]

    # ---- instructions

    def add(self, opcode: int, shared: bool, words: list[int | At]) -> None:
        touched = {word.storage for word in words if isinstance(word, At) and word.storage >= 0}
        self.instructions.append(_Instruction(opcode, shared, words, touched))

    def map(self, name: str, out: Tensor, a: Tensor, b: Tensor | float | None = None) -> None:
        """out = name(a, b), elementwise with broadcasting."""
        kind = self._map_type(name, out, a, b)
        if kind is None:
            a = self.floats(a)
            b = self.floats(b) if isinstance(b, Tensor) else b
            kind = FLOAT
            if not self.is_float(out):
                raise NotReplayable(f"{name} to {out.dtype}")
        operands = [out, a.expand(out.shape)]
        if isinstance(b, Tensor):
            operands.append(b.expand(out.shape))
        sizes, strides = collapsed(out.shape, [t.stride() for t in operands])
        if len(sizes) > 4:
            raise NotReplayable(f"{name} over {len(sizes)} dimensions")
        pad = [0] * (4 - len(sizes))
        words: list[int | At] = [MAP_OPS[name], kind, *[1] * len(pad), *sizes]
        for tensor, stride in zip(operands, strides, strict=True):
            words += [self.at(tensor), *pad, *stride]
        if len(operands) == 2:
            words += [NOWHERE, 0, 0, 0, 0]
        words.append(bits(0.0 if b is None or isinstance(b, Tensor) else float(b)))
        self.add(MAP, out.numel() >= SHARED_ELEMENTS, words)

    def _map_type(self, name: str, out: Tensor, a: Tensor, b: Any) -> int | None:
        """How the instruction reads its operands; None where they have to be made floats first."""
        tensors = [t for t in (out, a, b) if isinstance(t, Tensor)]
        if all(self.is_float(t) for t in tensors):
            return FLOAT
        if {t.dtype for t in tensors} == {torch.int64}:
            return INT if name in _INT_MAPS and not isinstance(b, float) else None
        if name == "copy" and self.is_float(out):
            return {torch.int64: INT_TO_FLOAT, torch.bfloat16: BF16_TO_FLOAT}.get(a.dtype)
        return None

    def linear(
        self,
        x: Tensor,  # (*, K)
        weight: Tensor,  # (N, K)
        y: Tensor,  # (*, N)
        *,
        bias: Tensor | None = None,
        alpha: float = 1.0,
        accumulate: bool = False,
        extra: tuple[Tensor, Tensor] | None = None,  # (*, R), (N, R)
    ) -> None:
        """y = alpha (x weight^T + extra[0] extra[1]^T) + bias, or y plus that."""
        x, rows, ldx = self.matrix(x)
        N, K = weight.shape
        self.check_float(y)
        halves = self.in_halves(weight)
        bias = None if bias is None else self.floats(bias)
        _, _, ldy = self.matrix(y)
        if bias is not None and bias.stride(0) != 1 and N > 1:
            raise NotReplayable("a bias that is not contiguous")
        if weight.stride(1) == 1 or K == 1:
            opcode, ldw = LINEAR, weight.stride(0)
        elif weight.stride(0) == 1 or N == 1:
            opcode, ldw = LINEAR_T, weight.stride(1)
        else:
            raise NotReplayable("a weight without a contiguous dimension")
        more: list[int | At] = [0, NOWHERE, 0, NOWHERE, 0]
        if extra is not None:
            s, b = extra
            if opcode == LINEAR_T or b.stride(1) != 1 or self.in_halves(b) != halves:
                self.linear(s, b, y, bias=bias, alpha=alpha, accumulate=accumulate)
                bias, accumulate = None, True
            else:
                s, _, lds = self.matrix(s)
                more = [b.shape[1], self.at(s), lds, self.at(b), b.stride(0)]
        shared = rows * N * K >= SHARED_PRODUCTS
        self.add(
            opcode,
            shared,
            [
                *(int(halves), rows, N, K),
                *(self.at(x), ldx, self.at(weight), ldw),
                *more,
                self.at(bias),
                *(self.at(y), ldy),
                *(bits(alpha), int(accumulate)),
                *(1, 0, 0, 0),
            ],
        )

    # ---- the end

    def program(self) -> Program:
        places, arena = self._places()
        slots = {storage: i + 1 for i, storage in enumerate(self.outside)}
        words: list[int] = []
        for instruction in self.instructions:
            start = len(words)
            words += [instruction.opcode, 0, int(instruction.shared)]
            for word in instruction.words:
                if not isinstance(word, At):
                    words.append(int(word))
                elif word.storage in places:
                    words += [0, places[word.storage] + word.offset]
                elif word.storage < 0:
                    words += [-1, 0]
                else:
                    words += [slots[word.storage], word.offset]
            words[start + 1] = len(words) - start
        return Program(words, len(self.instructions), list(self.outside.values()), arena)

    def _places(self) -> tuple[dict[int, int], int]:
        """Offsets in the arena, by first fit, of storages that are in use at the same time."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for i, instruction in enumerate(self.instructions):
            for storage in instruction.touched & self.made.keys():
                first.setdefault(storage, i)
                last[storage] = i
        places: dict[int, int] = {}
        held: list[tuple[int, int, int]] = []  # start, end and last use, by start
        arena = 0
        for storage in sorted(first, key=lambda s: first[s]):
            held = [part for part in held if part[2] >= first[storage]]
            size = -(-self.made[storage] // _LINE) * _LINE
            start = 0
            for begin, end, _ in held:
                if start + size <= begin:
                    break
                start = max(start, end)
            places[storage] = start
            held = sorted([*held, (start, start + size, last[storage])])
            arena = max(arena, start + size)
        return places, arena


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _not_covered(tensor: Tensor) -> NotReplayable:
    return NotReplayable(f"{tensor.dtype}; float32, bfloat16 and int64 are covered")


def collapsed(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[list[int], list[list[int]]]:
    """Dimensions of size 1 dropped, and those merged that every operand walks as one."""
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(shape):
        if size == 1:
            continue
        here = [stride[d] for stride in strides]
        if sizes and all(m[-1] == h * size for m, h in zip(merged, here, strict=True)):
            sizes[-1] *= size
            for m, h in zip(merged, here, strict=True):
                m[-1] = h
        else:
            sizes.append(size)
            for m, h in zip(merged, here, strict=True):
                m.append(h)
    return sizes, merged

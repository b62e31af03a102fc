"""The operations of PyTorch that have instructions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import hydra_kernels.replay.draw  # noqa: F401  registers its op
from hydra_kernels.replay.lowering import (
    ATTENTION,
    DRAW,
    GATHER,
    LAYER_NORM,
    MEAN,
    NOWHERE,
    PUT,
    SHARED_ELEMENTS,
    SHARED_PRODUCTS,
    SOFTMAX,
    SUM,
    At,
    Lowering,
    Node,
    NotReplayable,
    Program,
    bits,
    collapsed,
)

aten = torch.ops.aten

_Handler = Callable[[Lowering, Node], None]
_HANDLERS: dict[Any, _Handler] = {}


def lower(nodes: Sequence[Node], outputs: Sequence[Tensor]) -> Program:
    """The program of recorded operations; ``outputs`` keep their own storages.

    Raises:
        NotReplayable: naming every operation that has no instruction.
    """
    lowering = Lowering(outputs)
    unknown = set()
    for node in nodes:
        if lowering.is_view(node):
            continue
        handler = _HANDLERS.get(node.op)
        if handler is None:
            unknown.add(str(node.op))
        elif not unknown:
            handler(lowering, node)
    if unknown:
        raise NotReplayable(f"no instruction for {', '.join(sorted(unknown))}")
    return lowering.program()


def lowers(*ops: Any) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        for op in ops:
            _HANDLERS[op] = handler
        return handler

    return register


@lowers(aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default)
def _empty(to: Lowering, node: Node) -> None:
    to.makes(node.out)


@lowers(aten.arange.default, aten.arange.start, aten.zeros.default, aten.ones.default,
         aten.full.default, aten.scalar_tensor.default)  # fmt: skip
def _constant(to: Lowering, node: Node) -> None:
    """Stays where it is; no instruction may write there, for it would not be made anew."""
    to.constants.add(node.out.untyped_storage().data_ptr())


_UNARY = {
    aten.neg.default: "neg",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.exp.default: "exp",
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.cos.default: "cos",
    aten.sin.default: "sin",
    aten.floor.default: "floor",
    aten.log.default: "log",
    aten.clone.default: "copy",
}


@lowers(*_UNARY)
def _unary(to: Lowering, node: Node) -> None:
    to.map(_UNARY[node.op], to.makes(node.out), node.args[0])


@lowers(aten._to_copy.default)
def _to_copy(to: Lowering, node: Node) -> None:
    if not to.cast(node.out, node.args[0]):
        to.map("copy", to.makes(node.out), node.args[0])


@lowers(aten.gelu.default)
def _gelu(to: Lowering, node: Node) -> None:
    by_tanh = node.kwargs.get("approximate", "none") == "tanh"
    to.map("gelu_tanh" if by_tanh else "gelu", to.makes(node.out), node.args[0])


@lowers(aten.pow.Tensor_Scalar)
def _pow(to: Lowering, node: Node) -> None:
    name = {2: "square", 3: "cube", 0.5: "sqrt"}.get(node.args[1])
    if name is None:
        raise NotReplayable(f"a power of {node.args[1]}")
    to.map(name, to.makes(node.out), node.args[0])


_BINARY = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.mul.Scalar: "mul",
    aten.div.Scalar: "div",
    aten.maximum.default: "max",
    aten.minimum.default: "min",
}
_IN_PLACE = {
    aten.add_.Tensor: "add",
    aten.sub_.Tensor: "sub",
    aten.mul_.Tensor: "mul",
    aten.div_.Tensor: "div",
}


@lowers(*_BINARY, *_IN_PLACE)
def _binary(to: Lowering, node: Node) -> None:
    a, b = node.args[:2]
    if len(node.args) > 2 or node.kwargs.get("alpha", 1) != 1:
        raise NotReplayable(f"{node.op} with a factor")
    if not isinstance(a, Tensor):
        raise NotReplayable(f"{node.op} of a number")
    if node.op in _BINARY:
        to.map(_BINARY[node.op], to.makes(node.out), a, b)
    else:
        to.map(_IN_PLACE[node.op], to.writes(a), a, b)


@lowers(aten.clamp.default)
def _clamp(to: Lowering, node: Node) -> None:
    x, *bounds = (*node.args, None)[:3]
    bounds = [*bounds, None][:2]
    low, high = (node.kwargs.get(name, b) for name, b in zip(("min", "max"), bounds, strict=True))
    out = to.makes(node.out)
    for name, bound in (("max", low), ("min", high)):
        if bound is not None:
            to.map(name, out, x, float(bound))
            x = out


@lowers(aten.repeat.default)
def _repeat(to: Lowering, node: Node) -> None:
    x, repeats = node.args
    shape = [1] * (len(repeats) - x.dim()) + list(x.shape)
    out = to.makes(node.out)
    if out.numel() == 0:
        return
    # Each dimension as which repetition, and where in it.
    apart = [size for pair in zip(repeats, shape, strict=True) for size in pair]
    once = [size for pair in zip([1] * len(shape), shape, strict=True) for size in pair]
    to.map("copy", out.view(apart), x.view(once))


@lowers(aten.cat.default, aten.stack.default)
def _cat(to: Lowering, node: Node) -> None:
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else 0
    out = to.makes(node.out)
    if node.op == aten.stack.default:
        dim %= out.dim()
        parts = [part.unsqueeze(dim) for part in parts]
    start = 0
    for part in parts:
        if part.numel() == 0:  # which may have fewer dimensions than the others
            continue
        width = part.shape[dim]
        to.map("copy", out.narrow(dim, start, width), part)
        start += width


def _rows(to: Lowering, opcode: int, node: Node, out: Tensor, width: int, *more: Any) -> None:
    x = to.contiguous(node.args[0])
    to.check_float(out)
    weight, bias, eps = more or (None, None, 0.0)
    shared = x.numel() >= SHARED_ELEMENTS
    words: list[int | At] = [
        x.numel() // width,
        width,
        to.at(x),
        to.at(weight),
        to.at(bias),
        to.at(out),
    ]
    to.add(opcode, shared, [*words, bits(eps)])


@lowers(aten.mean.dim)
def _mean(to: Lowering, node: Node) -> None:
    x, dims = node.args[:2]
    if [d % x.dim() for d in dims] != [x.dim() - 1] or node.out.dtype != x.dtype:
        raise NotReplayable(f"a mean over dimensions {dims} of {x.dim()} in {node.out.dtype}")
    _rows(to, MEAN, node, to.makes(node.out), x.shape[-1])


@lowers(aten.sum.dim_IntList)
def _sum(to: Lowering, node: Node) -> None:
    x, dims = node.args[:2]
    if not dims or len(dims) != 1 or node.out.dtype != x.dtype or not node.out.is_contiguous():
        raise NotReplayable(f"a sum over dimensions {dims} of {x.dim()} in {node.out.dtype}")
    dim = dims[0] % x.dim()
    out = to.makes(node.out)
    if dim == x.dim() - 1:
        _rows(to, SUM, node, out, x.shape[-1])
        return
    out = out if out.dim() < x.dim() else out.squeeze(dim)
    to.map("copy", out, x.select(dim, 0))
    for i in range(1, x.shape[dim]):
        to.map("add", out, out, x.select(dim, i))


@lowers(aten._softmax.default, aten._safe_softmax.default)
def _softmax(to: Lowering, node: Node) -> None:
    x, dim = node.args[:2]
    safe = node.op == aten._safe_softmax.default
    if dim % x.dim() != x.dim() - 1 or (not safe and node.args[2]) or node.out.dtype != x.dtype:
        raise NotReplayable(f"a softmax over dimension {dim} of {x.dim()}")
    if not node.out.is_contiguous():
        raise NotReplayable("a softmax that is not contiguous")
    _rows(to, SOFTMAX, node, to.makes(node.out), x.shape[-1], None, None, float(safe))


@lowers(aten.native_layer_norm.default)
def _layer_norm(to: Lowering, node: Node) -> None:
    _, shape, weight, bias, eps = node.args
    for tensor in (weight, bias):
        if tensor is not None and not tensor.is_contiguous():
            raise NotReplayable("a layer norm whose weight is not contiguous")
    weight, bias = (None if t is None else to.floats(t) for t in (weight, bias))
    out = to.makes(node.out[0])
    if not out.is_contiguous():
        raise NotReplayable("a layer norm that is not contiguous")
    _rows(to, LAYER_NORM, node, out, math.prod(shape), weight, bias, eps)


@lowers(aten.embedding.default)
def _embedding(to: Lowering, node: Node) -> None:
    table, ids = node.args[:2]
    out = to.makes(node.out)
    if ids.dtype != torch.int64 or not ids.is_contiguous() or table.stride(1) != 1:
        raise NotReplayable("an embedding whose ids or table are not contiguous")
    words: list[int | At] = [
        int(to.in_halves(table)),
        ids.numel(),
        table.shape[1],
        table.shape[0],
        to.at(ids),
        to.at(table),
        table.stride(0),
        to.at(out),
    ]
    to.add(GATHER, False, words)


@lowers(aten.index_put_.default)
def _put(to: Lowering, node: Node) -> None:
    target, indices, value = node.args[:3]
    if len(node.args) > 3 and node.args[3]:
        raise NotReplayable("an index_put that accumulates")
    dims = [d for d, index in enumerate(indices) if index is not None]
    given = [indices[d] for d in dims]
    if (
        len(dims) > 2
        or dims[0] != 0  # so that the indexed dimension of the value comes first
        or any(i.dtype != torch.int64 or i.dim() != 1 or not i.is_contiguous() for i in given)
        or len({i.numel() for i in given}) > 1
    ):
        raise NotReplayable("an index_put with other than one or two lists of indices")
    to.writes(target)
    rest = [d for d in range(target.dim()) if d not in dims]
    count = given[0].numel()
    shape = [count, *(target.shape[d] for d in rest)]
    value = to.floats(value).expand(shape)
    sizes, (strides_to, strides_from) = collapsed(
        shape[1:], [[target.stride(d) for d in rest], value.stride()[1:]]
    )
    if len(sizes) > 3:
        raise NotReplayable(f"an index_put of {len(sizes)} dimensions")
    pad = 3 - len(sizes)
    words: list[int | At] = [int(to.in_halves(target)), count]
    for n in range(2):
        there = n < len(dims)
        words.append(to.at(given[n]) if there else NOWHERE)
        words += [target.stride(dims[n]), target.shape[dims[n]]] if there else [0, 0]
    words += [*[1] * pad, *sizes, to.at(target), *[0] * pad, *strides_to]
    words += [to.at(value), value.stride(0), *[0] * pad, *strides_from]
    to.add(PUT, False, words)


@lowers(aten.mm.default)
def _mm(to: Lowering, node: Node) -> None:
    a, b = node.args
    to.linear(a, b.t(), to.makes(node.out))


@lowers(aten.addmm.default)
def _addmm(to: Lowering, node: Node) -> None:
    given, a, b = node.args
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if beta not in (0, 1) or (beta == 1 and given.dim() != 1):
        raise NotReplayable(f"an addmm to {given.dim()} dimensions times {beta}")
    bias = given if beta == 1 else None
    to.linear(a, b.t(), to.makes(node.out), bias=bias, alpha=float(alpha))


@lowers(torch.ops.hydra.lora_linear_fwd.default)
def _lora_linear(to: Lowering, node: Node) -> None:
    x, weights, biases, lora_a, lora_b, has_bias, counts, _, scales, _, dropout, ids, *_ = node.args
    if ids is not None or dropout > 0.0 or any(count != 1 for count in counts):
        raise NotReplayable("LoRA layers with adapter ids in a tensor, several adapters or dropout")
    given = iter(biases)
    for i, weight in enumerate(weights):
        s = to.new((*x.shape[:-1], lora_a[i].shape[0]))
        to.linear(x, lora_a[i], s, alpha=float(scales[i]))
        bias = next(given) if has_bias[i] else None
        to.linear(x, weight, to.makes(node.out[0][i]), bias=bias, extra=(s, lora_b[i]))


@lowers(aten._scaled_dot_product_flash_attention_for_cpu.default)
def _attention(to: Lowering, node: Node) -> None:
    q, k, v, dropout, causal = (*node.args, 0.0, False)[:5]
    mask = node.kwargs.get("attn_mask")
    scale = node.kwargs.get("scale")
    B, heads, queries, width = q.shape
    kv_heads, length = k.shape[1:3]
    if dropout > 0.0 or causal or v.shape[3] != width:
        raise NotReplayable("causal attention, dropout in it, or values of another width")
    halves = to.in_halves(k)
    if halves != to.in_halves(v):
        k, v, halves = to.floats(k), to.floats(v), False
    q = to.floats(q)
    out = to.makes(node.out[0])
    if any(t.stride(3) != 1 for t in (q, k, v, out)):
        raise NotReplayable("attention whose heads are not contiguous")
    words: list[int | At] = [int(halves), B, heads, kv_heads, queries, length, width]
    for tensor in (q, k, v):
        words += [to.at(tensor), *tensor.stride()[:3]]
    if mask is None:
        words += [NOWHERE, 0, 0, 0]
    else:
        mask = to.floats(mask).expand(B, heads, queries, length)
        if mask.stride(3) != 1 and length > 1:
            raise NotReplayable("a mask of attention that is not contiguous")
        words += [to.at(mask), *mask.stride()[:3]]
    words += [to.at(out), *out.stride()[:3]]
    words.append(bits(1.0 / math.sqrt(width) if scale is None else float(scale)))
    to.add(ATTENTION, B * heads * queries * length * width >= SHARED_PRODUCTS, words)


@lowers(torch.ops.hydra.draw_tokens.default)
def _draw_tokens(to: Lowering, node: Node) -> None:
    logits, uniforms, columns, temperature, sample, late, late_from, top_k, top_p, min_p = node.args
    for tensor in (logits, uniforms):
        to.check_float(tensor)
        if tensor.stride(1) != 1:
            raise NotReplayable("a draw from logits or uniforms that are not contiguous")
    if columns.dtype != torch.int64 or not columns.is_contiguous():
        raise NotReplayable("a draw whose columns are not contiguous int64")
    B, V = logits.shape
    words: list[int | At] = [B, V, to.at(logits), logits.stride(0)]
    words += [to.at(uniforms), uniforms.stride(0), uniforms.shape[1], to.at(columns)]
    words += [to.at(to.makes(out)) for out in node.out]
    words += [bits(temperature), int(sample), top_k, bits(top_p), bits(min_p)]
    late = [token for token in late if 0 <= token < V]  # others would be written beside the row
    words += [late_from, len(late), *late]
    to.add(DRAW, B * V >= SHARED_ELEMENTS, words)

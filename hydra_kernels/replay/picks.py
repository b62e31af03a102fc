"""The operations that choose by indices: elements, rows, the largest, the matrices of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels.replay.lowering import (
    EXPERTS,
    PICK,
    SHARED_PRODUCTS,
    TOP_K,
    At,
    Lowering,
    Node,
    NotReplayable,
    Picked,
    collapsed,
)
from hydra_kernels.replay.operations import lowers

aten = torch.ops.aten


@lowers(aten.topk.default)
def _top_k(to: Lowering, node: Node) -> None:
    x, k = node.args[:2]
    dim = node.args[2] if len(node.args) > 2 else -1
    largest = node.args[3] if len(node.args) > 3 else True
    if dim % x.dim() != x.dim() - 1 or not largest or not 0 < k <= x.shape[-1]:
        raise NotReplayable(f"the {k} largest over dimension {dim} of {x.dim()}")
    _largest(to, x, k, *node.out)


@lowers(aten.max.dim, aten.amax.default)
def _max(to: Lowering, node: Node) -> None:
    x = node.args[0]
    dims = node.args[1] if len(node.args) > 1 else []
    dims = [dims] if isinstance(dims, int) else dims
    if [d % x.dim() for d in dims] != [x.dim() - 1]:
        raise NotReplayable(f"the largest over dimensions {dims} of {x.dim()}")
    if isinstance(node.out, Tensor):
        _largest(to, x, 1, node.out, to.new(node.out.shape, torch.int64))
    else:
        _largest(to, x, 1, *node.out)


def _largest(to: Lowering, x: Tensor, k: int, values: Tensor, ids: Tensor) -> None:
    x = to.contiguous(x)
    to.check_float(to.makes(values))
    words: list[int | At] = [x.numel() // x.shape[-1], x.shape[-1], k]
    to.add(TOP_K, False, [*words, *(to.at(t) for t in (x, values, to.makes(ids)))])


def _pick(to: Lowering, out: Tensor, table: Tensor, dim: int, ids: Tensor) -> None:
    """out[...] = table[...] with coordinate ``dim`` replaced by ids[...], all of one rank."""
    if ids.dtype != torch.int64:
        raise NotReplayable(f"indices of {ids.dtype}")
    to.check_float(out)
    halves = to.in_halves(table)
    along = table.stride(dim), table.shape[dim]
    # The replaced dimension is not walked, but picked from.
    strides = [0 if d == dim else stride for d, stride in enumerate(table.stride())]
    sizes, (so, sf, si) = collapsed(
        out.shape, [out.stride(), strides, ids.expand(out.shape).stride()]
    )
    if len(sizes) > 4:
        raise NotReplayable(f"indices of {len(sizes)} dimensions")
    pad = [0] * (4 - len(sizes))
    words: list[int | At] = [int(halves), *[1] * len(pad), *sizes, to.at(out), *pad, *so]
    to.add(PICK, False, [*words, to.at(table), *pad, *sf, to.at(ids), *pad, *si, *along])


@lowers(aten.gather.default)
def _gather(to: Lowering, node: Node) -> None:
    table, dim, ids = node.args[:3]
    _pick(to, to.makes(node.out), table, dim % table.dim(), ids)


@lowers(aten.index_select.default)
def _index_select(to: Lowering, node: Node) -> None:
    table, dim, ids = node.args
    dim %= table.dim()
    along = ids.view([-1 if d == dim else 1 for d in range(table.dim())])
    _pick(to, to.makes(node.out), table, dim, along)


@lowers(aten.index.Tensor)
def _index(to: Lowering, node: Node) -> None:
    table, indices = node.args
    (dim, *others) = [d for d, index in enumerate(indices) if index is not None]
    ids = indices[dim]
    if others or ids.dtype != torch.int64 or ids.dim() == 0:
        raise NotReplayable("an index of other than one list of int64")
    out = to.makes(node.out)
    if dim == 0 and ids.dim() == 1 and table.dim() == 3 and node.out.is_contiguous():
        to.picked[out.untyped_storage().data_ptr()] = Picked(out, table, ids)
        return
    before, after = table.shape[:dim], table.shape[dim + 1 :]
    # The dimensions of the indices stand where the one that they pick from stood.
    wide = table.as_strided(
        (*before, *[1] * (ids.dim() - 1), table.shape[dim], *after),
        (*table.stride()[:dim], *[0] * (ids.dim() - 1), *table.stride()[dim:]),
    )
    at = ids.view([*[1] * len(before), *ids.shape, *[1] * len(after)])
    _pick(to, out, wide, dim + ids.dim() - 1, at)


@lowers(aten.bmm.default)
def _bmm(to: Lowering, node: Node) -> None:
    a, b = node.args
    out = to.makes(node.out)
    for matrices, x, y in ((a, b, out), (b, a.mT, out.mT)):
        picked = to.picked.get(matrices.untyped_storage().data_ptr())
        if picked is not None:
            _experts(to, picked, matrices if matrices is a else matrices.mT, x, y)
            return
    for i in range(a.shape[0]):
        to.linear(a[i], b[i].t(), out[i])


def _experts(
    to: Lowering,
    picked: Picked,
    matrices: Tensor,  # (S, N, K)
    x: Tensor,  # (S, K, 1)
    y: Tensor,  # (S, N, 1)
) -> None:
    copies, source, ids = picked
    if x.shape[2] != 1 or not ids.is_contiguous():
        raise NotReplayable("products of matrices taken by an index with more than a row each")
    if matrices.stride() != copies.stride():  # the copies the other way round
        source = source.mT
        if matrices.stride() != copies.mT.stride():
            raise NotReplayable("a part of matrices taken by an index")
    if matrices.shape[1:] != source.shape[1:]:
        raise NotReplayable("a part of matrices taken by an index")
    transposed = source.stride(2) != 1
    ldw = source.stride(2 if transposed else 1)
    if source.stride(1 if transposed else 2) != 1:
        raise NotReplayable("experts without a contiguous dimension")
    S, N, K = matrices.shape
    x, _, ldx = to.matrix(x.squeeze(2))
    y = y.squeeze(2)
    to.check_float(y)
    words: list[int | At] = [int(to.in_halves(source)), int(transposed), S, N, K, to.at(x), ldx]
    words += [to.at(source), source.stride(0), ldw, source.shape[0], to.at(ids)]
    to.add(EXPERTS, S * N * K >= SHARED_PRODUCTS, [*words, to.at(y), y.stride(0)])

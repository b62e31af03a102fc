"""Rows so few that no factor is packed: csrc/cpu/lora_few.cpp, and BLAS."""

import pytest
import torch
import torch.nn.functional as F

from hydra_kernels import Projection, lora_linear, lora_linear_group
from hydra_kernels.ops.lora_linear import gated_linear
from tests.ops.test_lora_linear import make_layer
from tests.ops.test_lora_linear_kernels import BFLOAT, FLOAT, HALF, KERNELS, MIXES, leaves
from tests.ops.test_lora_linear_rows import close, three_ways

pytestmark = pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ extension is not built")

RANKS = (3, 8, 30)  # below a vector; one; several of all sizes and an odd end
IDS = {
    "no ids": lambda rows: None,
    "call": lambda rows: torch.tensor(2),
    "mixed": lambda rows: torch.arange(rows) % 4 - 1,
    "off": lambda rows: torch.full((rows,), -1),
}


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("rows", [1, 13])  # 13: in forward more than are taken at once
def test_as_near_to_float64_as_torch(rows, ids):
    weight, bias, a, b, scaling = make_layer(29, 37, RANKS)
    inputs = [torch.randn(rows, 37), weight, bias, *a, *b]
    settings = (3, scaling, IDS[ids](rows), 0.0, None, torch.randn(rows, 29))
    if ids == "no ids":
        inputs, settings = [*inputs[:4], b[0]], (1, scaling[:1], *settings[2:])
    close(*three_ways(inputs, *settings, backend="cpu"))


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("rows", [1, 13, 64])  # 64: not by BLAS where a dtype has none
@pytest.mark.parametrize("mix", MIXES[1:], ids=lambda m: "-".join(str(d)[6:] for d in m))
def test_in_other_dtypes_rounded_once(mix, rows, ids):
    """What is added is of float32: y is off by the base's rounding and one of its own."""
    weight, bias, a, b, scaling = make_layer(29, 37, RANKS, *mix)
    x, ids = torch.randn(rows, 37).to(mix[0]), IDS[ids](rows)
    if ids is None:
        a, b, scaling = a[1:2], b[1:2], scaling[1:2]
    y = lora_linear(x, weight, a, b, scaling, adapter_ids=ids, bias=bias, backend="cpu")
    assert y.dtype == mix[0]
    each = torch.zeros(rows, dtype=torch.int64) if ids is None else ids.expand(rows)
    exact = F.linear(x, weight, bias).double()
    for row, i in enumerate(each.tolist()):
        if i >= 0:
            exact[row] += scaling[i] * (x[row].double() @ a[i].double().T) @ b[i].double().T
    half_ulp = torch.finfo(mix[0]).eps / 2
    # 1e-5: what sums of 37 and 30 products in float32 are off by
    torch.testing.assert_close(y.double(), exact, rtol=half_ulp, atol=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF], ids=lambda d: str(d)[6:])
def test_a_row_s_bits_are_its_own(dtype):
    """Whatever rows are beside it, whoever computes it: with a base of zeros, all of y."""
    _, _, (a,), (b,), _ = make_layer(520, 1030, (33,), adapter_dtype=FLOAT)
    x, weight = torch.randn(15, 1030).to(dtype), torch.zeros(520, 1030, dtype=dtype)
    y = lora_linear(x, weight, a, b, 0.5, backend="cpu")
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            for rows in (slice(1), slice(3, 9), slice(15)):
                again = lora_linear(x[rows], weight, a, b, 0.5, backend="cpu")
                assert torch.equal(again, y[rows])
                ids = torch.zeros(again.shape[0], dtype=torch.int64)
                again = lora_linear(x[rows], weight, a, b, 0.5, adapter_ids=ids, backend="cpu")
                assert torch.equal(again, y[rows])
    finally:
        torch.set_num_threads(threads)


def test_several_adapters_on_a_row_round_it_once():
    """Two that cancel out leave what the base has rounded."""
    weight, bias, (a, _), (b, _), _ = make_layer(40, 24, (4, 4), BFLOAT, FLOAT)
    x = torch.randn(7, 24).bfloat16()
    layer = (x, weight, bias, (a, a), (b, -b), (0.5, 0.5), (0, 1), None)
    y = gated_linear(*layer, num_adapters=2, backend="cpu")
    assert torch.equal(y, F.linear(x, weight, bias))


def test_an_id_stands_for_several_rows_and_rows_that_are_off_keep_the_base_s_bits():
    weight, bias, a, b, scaling = make_layer(29, 37, RANKS)
    x, ids = torch.randn(4, 3, 37), torch.tensor([1, -1, 0, 2])
    y = lora_linear(x, weight, a, b, scaling, adapter_ids=ids, bias=bias, backend="cpu")
    base = F.linear(x, weight, bias)
    assert torch.equal(y[1], base[1])
    for row in (0, 2, 3):
        i = int(ids[row])
        torch.testing.assert_close(y[row], base[row] + scaling[i] * x[row] @ a[i].T @ b[i].T)


@pytest.mark.parametrize("wanted", [(0,), (3,), (6,), (0, 4), (5, 8)], ids=str)
def test_some_gradients_alone(wanted):
    weight, bias, a, b, scaling = make_layer(29, 37, RANKS)
    tensors = [torch.randn(5, 37), weight, bias, *a, *b]
    upstream = torch.randn(5, 29)

    def gradients(backend):
        given = leaves(*tensors)
        for i, t in enumerate(given):
            t.requires_grad_(i in wanted)
        ids = torch.tensor([0, 1, -1, 1, 2])
        y = lora_linear(
            *given[:2], given[3:6], given[6:], scaling, adapter_ids=ids, bias=given[2],
            backend=backend,
        )  # fmt: skip
        y.backward(upstream)
        assert [i for i, t in enumerate(given) if t.grad is not None] == list(wanted)
        return [given[i].grad for i in wanted]

    for mine, other in zip(gradients("cpu"), gradients("reference"), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("ids", ["no ids", "mixed"])
def test_strides_do_not_matter(ids):
    weight, bias, a, b, scaling = make_layer(29, 37, RANKS)
    x, upstream, ids = torch.randn(5, 37), torch.randn(5, 29), IDS[ids](5)

    def outputs(change):
        given = [change(t).detach().requires_grad_() for t in (x, weight, *a, *b)]
        y = lora_linear(
            *given[:2], given[2:5], given[5:], scaling, adapter_ids=ids, bias=bias, backend="cpu"
        )
        grads = torch.autograd.grad(y, given, change(upstream), allow_unused=True)
        return [y.detach(), *(g for g in grads if g is not None)]

    def apart(t):  # neither the rows nor the numbers of one next to each other
        return torch.stack((t, torch.full_like(t, torch.nan)), dim=-1)[..., 0]

    def with_room(t):  # rows further apart than they are long
        return F.pad(t, (0, 3), value=torch.nan)[:, : t.shape[1]]

    plain = outputs(torch.clone)
    for change in (apart, with_room, lambda t: t.t().contiguous().t()):
        for one, two in zip(plain, outputs(change), strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("rows", [5, 90, 300], ids=["few", "more", "merged"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_all_adapters_on_all_rows(rows, has_bias):
    weight, bias, a, b, scaling = make_layer(120, 100, (3, 8), bias=has_bias)
    x, upstream = torch.randn(rows, 100), torch.randn(rows, 120)

    def outputs(backend):
        given = leaves(x, *a, *b)
        y = gated_linear(
            given[0], weight, bias, given[1:3], given[3:], scaling, (0, 1), None, num_adapters=2,
            backend=backend,
        )  # fmt: skip
        return [y.detach(), *torch.autograd.grad(y, given, upstream)]

    for mine, other in zip(outputs("cpu"), outputs("reference"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_a_group_has_the_bits_of_its_layers():
    x = torch.randn(33, 1024)
    # of so few rows BLAS rounds a product with three lora_a at once otherwise
    layers = [make_layer(n, 1024, (3,)) for n in (64, 32, 32)]
    ys = lora_linear_group(
        x, [Projection(w, a, b, s, bias) for w, bias, a, b, s in layers], backend="cpu"
    )
    for y, (w, bias, a, b, s) in zip(ys, layers, strict=True):
        assert torch.equal(y, lora_linear(x, w, a, b, s, bias=bias, backend="cpu"))


@pytest.mark.parametrize("unread", [0, 1])
def test_a_projection_of_a_group_that_nothing_reads(unread):
    x, ids = torch.randn(6, 37), torch.tensor([0, 1, -1, 1, 1, 0])
    layers = [make_layer(n, 37, (3, 9)) for n in (29, 11)]
    upstream = torch.randn(6, (29, 11)[1 - unread])

    def gradients(backend):
        first, *flat = leaves(x, *(t for _, _, a, b, _ in layers for t in (*a, *b)))
        projections = [
            Projection(w, flat[4 * i : 4 * i + 2], flat[4 * i + 2 : 4 * i + 4], s, bias)
            for i, (w, bias, _, _, s) in enumerate(layers)
        ]
        ys = lora_linear_group(first, projections, adapter_ids=ids, backend=backend)
        ys[1 - unread].backward(upstream)
        return [t.grad for t in (first, *flat)]

    for mine, other in zip(gradients("cpu"), gradients("reference"), strict=True):
        if other is None or mine is None:
            assert mine is None or not mine.any()
            assert other is None or not other.any()
        else:
            torch.testing.assert_close(mine, other)


def test_ids_out_of_range_are_refused_in_both_passes():
    weight, _, a, b, _ = make_layer(6, 5, (2, 2))
    x, ids = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match="between -1 and 1, got 2"):
        lora_linear(x, weight, a, b, 1.0, adapter_ids=ids, backend="cpu")
    ids[2] = 1
    y = lora_linear(x, weight, a, b, 1.0, adapter_ids=ids, backend="cpu")
    with torch.autograd._unsafe_preserve_version_counter(ids):
        ids[2] = -2
    with pytest.raises(ValueError, match="between -1 and 1, got -2"):
        y.sum().backward()

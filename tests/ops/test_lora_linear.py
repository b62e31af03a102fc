"""One linear layer with gated adapters, on every backend that can run here."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_kernels import Projection, lora_linear, lora_linear_group
from hydra_kernels.backends import registry
from hydra_kernels.backends.reference import philox
from tests.numerics import device_of, training_backends

OP = "lora_linear"
BACKENDS = [*training_backends(OP), registry.REFERENCE]


def make_layer(n, k, ranks, dtype=torch.float32, adapter_dtype=None, device="cpu", bias=True):
    adapter_dtype = adapter_dtype or dtype
    weight = torch.randn(n, k, device=device).div_(k**0.5).to(dtype)
    lora_a = [torch.randn(r, k, device=device).div_(k**0.5).to(adapter_dtype) for r in ranks]
    lora_b = [torch.randn(n, r, device=device).to(adapter_dtype) for r in ranks]
    scaling = [0.5 + 0.25 * i for i in range(len(ranks))]
    return (
        weight,
        torch.randn(n, device=device).to(dtype) if bias else None,
        lora_a,
        lora_b,
        scaling,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """(1, 1) A^T = 3, half of that times B is (4.5, 6); with W the identity, (5.5, 7)."""
    device = device_of(backend)
    x = torch.ones(2, 2, device=device)
    lora_a = torch.tensor([[1.0, 2.0]], device=device)
    lora_b = torch.tensor([[3.0], [4.0]], device=device)
    ids = torch.tensor([0, -1], device=device)
    y = lora_linear(
        x, torch.eye(2, device=device), lora_a, lora_b, 0.5, adapter_ids=ids, backend=backend
    )
    assert y.tolist() == [[5.5, 7.0], [1.0, 1.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (3,), (3, 5)], ids=["call", "sequence", "row"])
def test_mixed_ids_equal_a_loop_over_rows(backend, shape):
    device = device_of(backend)
    weight, bias, lora_a, lora_b, scaling = make_layer(11, 7, (2, 5, 1), device=device)
    x = torch.randn(3, 5, 7, device=device)
    ids = torch.randint(-1, 3, shape, device=device)
    y = lora_linear(x, weight, lora_a, lora_b, scaling, adapter_ids=ids, bias=bias, backend=backend)
    rows = torch.broadcast_to(ids.view(shape + (1,) * (2 - len(shape))), (3, 5))
    for b in range(3):
        for t in range(5):
            i = int(rows[b, t])
            expected = F.linear(x[b, t], weight, bias)
            if i >= 0:
                expected = expected + scaling[i] * (x[b, t] @ lora_a[i].T) @ lora_b[i].T
            torch.testing.assert_close(y[b, t], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_off_is_the_base_layer_bit_for_bit(backend, dtype):
    device = device_of(backend)
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("bfloat16 products need a GPU: Triton's interpreter gets them wrong")
    weight, bias, lora_a, lora_b, scaling = make_layer(9, 6, (4, 4), dtype, device=device)
    x = torch.randn(2, 3, 6, device=device).to(dtype)
    base = F.linear(x, weight, bias)
    for ids in (torch.tensor(-1), torch.full((2,), -1), torch.full((2, 3), -1)):
        y = lora_linear(
            x, weight, lora_a, lora_b, scaling, adapter_ids=ids.to(device), bias=bias,
            backend=backend,
        )  # fmt: skip
        if device == "cpu":
            assert torch.equal(y.view(torch.uint8), base.view(torch.uint8))
        else:
            torch.testing.assert_close(y, base)


def reference_arguments(ranks, k, n, dropout=0.0, ids=None):
    x = torch.randn(2, 3, k, dtype=torch.float64, requires_grad=True)
    weight, bias, lora_a, lora_b, scaling = make_layer(n, k, ranks, torch.float64)
    tensors = [x, weight, bias, *lora_a, *lora_b]
    for t in tensors:
        t.requires_grad_()

    def f(x, weight, bias, *adapters):
        return lora_linear(
            x,
            weight,
            adapters[: len(ranks)],
            adapters[len(ranks) :],
            scaling,
            adapter_ids=ids,
            bias=bias,
            dropout=dropout,
            seed=3,
            backend="reference",
        )

    return f, tensors


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_of_the_reference(dropout):
    ids = torch.tensor([[0, 1, -1], [1, 1, 0]])
    f, tensors = reference_arguments((2, 3), 4, 3, dropout, ids)
    assert torch.autograd.gradcheck(f, tensors)


def test_philox_known_answers():
    """Random123's kat_vectors for philox4x32-10."""
    ones = (1 << 64) - 1
    for key, low, high, expected in [
        (0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (ones, ones, ones, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x299F31D0A4093822,
            0x85A308D3243F6A88,
            0x0370734413198A2E,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]:
        key, low, high = (torch.tensor(v - (1 << 64) if v >> 63 else v) for v in (key, low, high))
        drawn = philox.words(low, key, high).tolist()
        assert " ".join(f"{word:08x}" for word in drawn) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_drops_what_philox_says_and_only_before_the_adapter(backend):
    device = device_of(backend)
    k, p = 13, 0.3
    x = torch.randn(4, 5, k, device=device)
    seed = torch.tensor([123456789012345, 7], device=device)
    eye, zero = torch.eye(k, device=device), torch.zeros(k, k, device=device)
    y = lora_linear(x, zero, eye, eye, 1.0, dropout=p, seed=seed, backend=backend)
    kept = philox.keep(20, k, p, seed.cpu()).view(4, 5, k).to(device)
    torch.testing.assert_close(y, torch.where(kept, x / (1 - p), 0.0))
    base = lora_linear(x, eye, eye, zero, 1.0, dropout=p, seed=seed, backend=backend)
    torch.testing.assert_close(base, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_mask_changes_at_every_call_and_repeats_with_the_generator(backend):
    device = device_of(backend)
    x = torch.randn(8, 32, device=device)
    eye, zero = torch.eye(32, device=device), torch.zeros(32, 32, device=device)

    def masks(n):
        torch.manual_seed(5)
        return [
            lora_linear(x, zero, eye, eye, 1.0, dropout=0.5, backend=backend) != 0 for _ in range(n)
        ]

    first, again = masks(2), masks(2)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_probability(p):
    kept = philox.keep(1000, 1003, p, torch.tensor([1, 2]))
    # five standard deviations of a mean of a million draws
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * (p * (1 - p) / 1e6) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_dropout_at_its_ends(backend, dropout):
    device = device_of(backend)
    weight, bias, lora_a, lora_b, _ = make_layer(5, 8, (2,), device=device)
    x = torch.randn(3, 8, device=device)
    y = lora_linear(x, weight, lora_a, lora_b, 0.5, bias=bias, dropout=dropout, backend=backend)
    expected = F.linear(x, weight, bias)
    if dropout == 0.0:
        expected = expected + 0.5 * x @ lora_a[0].T @ lora_b[0].T
    torch.testing.assert_close(y, expected)


def test_float64_with_dropout_is_not_left_to_kernels_of_float32():
    weight, bias, lora_a, lora_b, _ = make_layer(5, 8, (2,), torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64)
    inputs = (x, weight, lora_a, lora_b, 0.5)
    lora_linear(*inputs, bias=bias)  # what is chosen without dropout is no answer for this one
    y, expected = (
        lora_linear(*inputs, bias=bias, dropout=0.4, seed=3, backend=name)
        for name in (None, "reference")
    )
    torch.testing.assert_close(y, expected)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape_equals_the_reference(data):
    leading = data.draw(st.lists(st.integers(0, 4), max_size=3))
    k, n = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    ranks = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    id_dims = data.draw(st.integers(0, len(leading)))
    weight, bias, lora_a, lora_b, scaling = make_layer(n, k, ranks)
    x = torch.randn(*leading, k)
    ids = torch.randint(-1, len(ranks), leading[:id_dims])
    inputs = (x, weight, lora_a, lora_b, scaling)
    expected = lora_linear(*inputs, adapter_ids=ids, bias=bias, backend="reference")
    for backend in BACKENDS:
        if device_of(backend) == "cpu":
            y = lora_linear(*inputs, adapter_ids=ids, bias=bias, backend=backend)
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(), (0,), (3, 0)], ids=str)
def test_one_dimensional_and_empty_inputs(backend, leading):
    device = device_of(backend)
    weight, bias, lora_a, lora_b, _ = make_layer(5, 8, (2,), device=device)
    x = torch.randn(*leading, 8, device=device, requires_grad=True)
    lora_a[0].requires_grad_()
    y = lora_linear(x, weight, lora_a[0], lora_b[0], 0.5, bias=bias, backend=backend)
    expected = F.linear(x, weight, bias) + 0.5 * x @ lora_a[0].T @ lora_b[0].T
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, lora_a[0]), upstream),
        torch.autograd.grad(expected, (x, lora_a[0]), upstream),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(4,), (2, 2)], ids=str)
def test_outputs_may_be_changed_in_place(backend, leading):
    """As those of F.linear, which are no views; a residual may be added to them, say."""
    device = device_of(backend)
    weight, bias, lora_a, lora_b, scaling = make_layer(11, 7, (2,), device=device)
    x = torch.randn(*leading, 7, device=device, requires_grad=True)
    y = lora_linear(x, weight, lora_a, lora_b, scaling, bias=bias, backend=backend)
    projections = [Projection(weight, lora_a, lora_b, scaling, bias)] * 2
    first, second = lora_linear_group(x, projections, backend=backend)
    expected = 2 * y.detach() + 1
    merged = weight + scaling[0] * lora_b[0] @ lora_a[0]
    for each in (y, first, second):
        each.mul_(2).add_(1)
        torch.testing.assert_close(each, expected)
        (dx,) = torch.autograd.grad(each.sum(), x, retain_graph=True)
        torch.testing.assert_close(dx, 2 * merged.sum(0).expand_as(x))


# on a CPU: by BLAS, by the extension's kernels, by merged weights
@pytest.mark.parametrize(
    "backend, rows",
    [(b, rows) for b in training_backends(OP) for rows in ((3, 12, 90) if b == "cpu" else (3,))],
)
def test_gradients_are_not_differentiable(backend, rows):
    """A gradient penalty would miss its own share: refused, also where the rest of it asks."""
    device = device_of(backend)
    weight, bias, (a,), (b,), _ = make_layer(5, 8, (2,), device=device)
    tensors = [torch.randn(rows, 8, device=device), weight, bias, a, b]
    for i, t in enumerate(tensors):
        leaf = t.clone().requires_grad_()
        x, w, c, *adapter = (*tensors[:i], leaf, *tensors[i + 1 :])
        y = lora_linear(x, w, *adapter, 0.5, bias=c, backend=backend)
        projections = [Projection(w, *adapter, 0.5, c)] * 2
        _, read = lora_linear_group(x, projections, backend=backend)
        for each in (y, read):
            (grad,) = torch.autograd.grad(each.square().sum(), leaf, create_graph=True)
            (once,) = torch.autograd.grad(each.square().sum(), leaf, retain_graph=True)
            torch.testing.assert_close(grad, once)
            with pytest.raises(RuntimeError, match="lora_linear: its gradient has no derivative"):
                torch.autograd.grad(grad.square().sum() + leaf.sum(), leaf)


def test_the_second_derivative_of_the_reference():
    f, tensors = reference_arguments((1, 2), 2, 2, 0.4, torch.tensor([[0, 1, -1], [1, 1, 0]]))
    assert torch.autograd.gradgradcheck(f, tensors)


def test_transforms_agree_with_a_loop():
    """Also after a call without one: what that chose cannot read the tensors of torch.func."""
    weight, bias, lora_a, lora_b, scaling = make_layer(5, 8, (2, 3))
    x, ids = torch.randn(4, 3, 8), torch.tensor([0, -1, 1, 0])

    def one(x, i):
        return lora_linear(x, weight, lora_a, lora_b, scaling, adapter_ids=i, bias=bias)

    def group(x, i):
        return lora_linear_group(x, [Projection(weight, lora_a, lora_b, scaling)], adapter_ids=i)[0]

    for f in (one, group):
        expected = torch.stack([f(*row) for row in zip(x, ids, strict=True)])
        torch.testing.assert_close(torch.vmap(f)(x, ids), expected)
        dx = torch.vmap(torch.func.grad(lambda x, i, f=f: f(x, i).square().sum()))(x, ids)
        leaf = x.clone().requires_grad_()
        loss = sum(f(*row).square().sum() for row in zip(leaf, ids, strict=True))
        torch.testing.assert_close(dx, torch.autograd.grad(loss, leaf)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids", [None, [1, 0, -1, 1]], ids=["no ids", "ids"])
def test_scaling_in_tensors(backend, ids):
    """One for all, one for each, and beside numbers; constants, whatever they ask for."""
    device = device_of(backend)
    weight, bias, lora_a, lora_b, _ = make_layer(11, 7, (2, 5), device=device)
    x = torch.randn(4, 3, 7, device=device)
    ids = None if ids is None else torch.tensor(ids, device=device)

    def run(scaling):
        leaves = [t.clone().requires_grad_() for t in (x, *lora_a, *lora_b)]
        given = (leaves[0], weight, leaves[1:3], leaves[3:], scaling)
        y = lora_linear(*given, adapter_ids=ids, bias=bias, backend=backend)
        upstream = torch.linspace(-1, 1, y.numel(), device=device).view_as(y)
        grads = torch.autograd.grad(y, leaves, upstream, allow_unused=True)
        return [y.detach(), *(g for g in grads if g is not None)]

    two = torch.tensor([0.5, 0.75], device=device, dtype=torch.float64, requires_grad=True)
    one = torch.tensor(0.5, device=device, requires_grad=True)
    for tensors, numbers in ((one, 0.5), (two, [0.5, 0.75]), ([0.5, two[1]], [0.5, 0.75])):
        for a, b in zip(run(tensors), run(numbers), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for scaling in (one, two, [two[1], 0.5]):
        y = lora_linear(x, weight, lora_a, lora_b, scaling, adapter_ids=ids, backend=backend)
        assert not y.requires_grad


@pytest.mark.parametrize("backend", [n for n in BACKENDS if n != "triton"])
def test_autocast(backend):
    """All of it in autocast's dtype; gradients come back in the parameters'."""
    device = device_of(backend)
    weight, bias, lora_a, lora_b, _ = make_layer(11, 8, (2,), device=device)
    given = [torch.randn(20, 8, device=device), weight, *lora_a, *lora_b, bias]

    def run(tensors, autocast):
        leaves = [t.clone().requires_grad_() for t in tensors]
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = lora_linear(*leaves[:4], 0.5, bias=leaves[4], backend=backend)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    half = run([t.bfloat16() for t in given], False)
    y, *grads = run(given, True)
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)
    if backend != registry.REFERENCE:  # whose F.linear casts step by step
        for a, b in zip((y, *grads), half, strict=True):
            assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("backend", training_backends(OP))
def test_a_backward_within_autocast_is_that_of_its_forward(backend):
    device = device_of(backend)
    weight, bias, lora_a, lora_b, _ = make_layer(11, 8, (2,), device=device)
    leaves = [t.requires_grad_() for t in (weight, *lora_a, *lora_b, bias)]
    x = torch.randn(20, 8, device=device, requires_grad=True)
    y = lora_linear(x, *leaves[:3], 0.5, bias=leaves[3], backend=backend)
    upstream = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, *leaves], upstream, retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        found = torch.autograd.grad(y, [x, *leaves], upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_environment_is_asked_at_every_call(monkeypatch):
    weight, bias, lora_a, lora_b, scaling = make_layer(5, 8, (2,))
    inputs = (torch.randn(3, 8), weight, lora_a, lora_b, scaling)
    lora_linear(*inputs)
    monkeypatch.setenv("HYDRA_BACKEND", "tpu")
    with pytest.raises(NotImplementedError, match="no such backend"):
        lora_linear(*inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_projection_that_nothing_reads_gets_no_gradient(backend):
    device = device_of(backend)
    layers = [make_layer(n, 7, (2, 3), device=device) for n in (11, 5)]
    for _, _, lora_a, lora_b, _ in layers:
        for t in (*lora_a, *lora_b):
            t.requires_grad_()
    x = torch.randn(4, 7, device=device)
    ids = torch.tensor([0, 1, -1, 0], device=device)
    projections = [Projection(w, a, b, scaling, bias) for w, bias, a, b, scaling in layers]
    lora_linear_group(x, projections, adapter_ids=ids, backend=backend)[1].sum().backward()
    assert all(t.grad is None for each in layers[0][2:4] for t in each)
    assert all(t.grad.abs().sum() > 0 for each in layers[1][2:4] for t in each)


def test_refusals():
    weight, bias, lora_a, lora_b, scaling = make_layer(5, 8, (2, 3))
    x = torch.randn(4, 3, 8)
    good = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "scaling": scaling}
    # What fits is remembered, and nothing else.
    for more in ({}, {"bias": bias}, {"adapter_ids": torch.zeros(4, dtype=torch.long)}):
        lora_linear(**good, **more)
    for bad, message in [
        ({"x": x[..., :7]}, "x must be"),
        ({"weight": weight[0]}, "weight"),
        ({"weight": weight.double()}, "torch.float64"),
        ({"bias": bias[:3]}, "bias must be"),
        ({"lora_a": lora_a[0]}, "both be tensors"),
        ({"lora_b": lora_b[:1]}, "as many lora_b"),
        ({"lora_b": lora_b[::-1]}, "lora_a must be"),
        ({"lora_a": [a.double() for a in lora_a]}, "its lora_b"),
        ({"lora_a": [a.int() for a in lora_a], "lora_b": [b.int() for b in lora_b]}, "floating"),
        ({"x": x.int(), "weight": weight.int()}, "x must be of a floating-point dtype"),
        ({"bias": bias.double()}, "bias is torch.float64 and weight torch.float32"),
        ({"lora_a": lora_a[:1], "lora_b": [lora_a[1], *lora_b], "scaling": 1.0}, "as many lora_b"),
        ({"scaling": [1.0]}, "one number or 2"),
        ({"scaling": torch.ones(3)}, "one number or 2, got 3"),
        ({"dropout": 1.5}, "dropout must be"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": float("nan")}, "dropout must be"),
        ({"adapter_ids": torch.zeros(4)}, "integers"),
        ({"adapter_ids": [0, 1]}, "must be an integer tensor on cpu or None, got list"),
        ({"adapter_ids": torch.zeros(3, dtype=torch.long)}, "leading part"),
        ({"adapter_ids": torch.tensor(2)}, "between -1 and 1, got 2"),
        ({"adapter_ids": torch.tensor([0, 0, 0, -2])}, "between -1 and 1, got -2"),
        ({"adapter_ids": torch.zeros(4, dtype=torch.long, device="meta")}, "must be on cpu"),
        ({"dropout": 0.1, "seed": 1.0}, "seed must be an int, a tensor or None, got float"),
        ({"dropout": 0.1, "seed": torch.tensor([1.0])}, "seed must hold"),
        ({"dropout": 0.1, "seed": torch.tensor([1, 2, 3])}, r"seed must hold .* got \(3,\)"),
        ({"dropout": 0.1, "seed": torch.ones(2, device="meta").long()}, "seed .* on meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            lora_linear(**{**good, **bad})
    with pytest.raises(NotImplementedError, match="no such backend"):
        lora_linear(**good, backend="tpu")
    for name in (n for n in BACKENDS if device_of(n) == "cpu"):
        for wrong in (2, -2):
            with pytest.raises(ValueError, match=f"between -1 and 1, got {wrong}"):
                lora_linear(**good, adapter_ids=torch.tensor([0, wrong, 1, -1]), backend=name)
    half = {**good, "x": x.half()}
    with torch.autocast("cpu", torch.bfloat16):
        lora_linear(**half)
    with pytest.raises(ValueError, match="x is torch.float16 and weight torch.float32"):
        lora_linear(**half)

"""Which rows meet which adapters: many of them, one for all rows, none; and who is not read."""

import pytest
import torch
import torch.nn.functional as F

from hydra_kernels import Projection, lora_linear, lora_linear_group
from hydra_kernels.backends.reference import philox
from tests.numerics import assert_no_worse_than_torch, device_of, training_backends
from tests.ops.test_lora_linear import make_layer
from tests.ops.test_lora_linear_kernels import leaves, run

KERNELS = training_backends("lora_linear")


def close(actual, same, exact):
    for mine, torchs, right in zip(actual, same, exact, strict=True):
        # one ulp of the largest value, as in test_lora_linear_kernels
        ulp = torch.finfo(torchs.dtype).eps * max(right.abs().max().item(), 1e-3)
        assert_no_worse_than_torch(mine, torchs, right, atol=2 * ulp)


def three_ways(inputs, *settings, backend):
    """By the backend, by the reference in the same dtype and in float64."""
    return (
        run(inputs, *settings, backend),
        run(inputs, *settings, "reference"),
        run([t.double() for t in inputs], *settings, "reference"),
    )


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("ranks", ["equal", "mixed"])
def test_many_adapters(backend, dropout, ranks):
    """Past a sum of ranks of 256, and few rows for each, so that some adapters have none."""
    device = device_of(backend)
    k, n, leading = 40, 30, (6, 20)
    ranks = (16,) * 32 if ranks == "equal" else tuple(1 + 5 * i % 17 for i in range(32))
    if backend == "triton" and device == "cpu":  # interpreted, a block takes a millisecond
        leading, ranks = (2, 5), (150, 150) if ranks[0] == 16 else (9, 120, 130)
    weight, bias, a, b, scaling = make_layer(n, k, ranks, device=device)
    inputs = [torch.randn(*leading, k, device=device), weight, bias, *a, *b]
    ids = torch.randint(-1, len(ranks), leading, device=device)
    upstream = torch.randn(*leading, n, device=device)
    settings = (len(ranks), scaling, ids, dropout, torch.tensor([7, 1], device=device), upstream)
    actual, same, exact = three_ways(inputs, *settings, backend=backend)
    close(actual, same, exact)
    again = run(inputs, *settings, backend)
    for one, two in zip(actual, again, strict=True):
        assert torch.equal(one, two)


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ extension is not built")
@pytest.mark.parametrize("ids", [[0, 2, 0, -1], [2, 2, 2, 2]], ids=["mixed", "one"])
def test_an_adapter_of_no_row_is_not_read(ids):
    """That NaN in it changes nothing shows that it costs nothing."""
    weight, bias, a, b, scaling = make_layer(30, 40, (5, 8, 3))
    x = torch.randn(4, 25, 40)
    upstream = torch.randn(4, 25, 30)
    ids = torch.tensor(ids)
    settings = (3, scaling, ids, 0.0, None, upstream)
    clean = run([x, weight, bias, *a, *b], *settings, "cpu")
    a[1], b[1] = torch.full_like(a[1], torch.nan), torch.full_like(b[1], torch.nan)
    for one, two in zip(clean, run([x, weight, bias, *a, *b], *settings, "cpu"), strict=True):
        assert torch.equal(one, two)
    assert not clean[5].any()  # its gradient


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("ids", [None, 1], ids=["no ids", "one id"])
@pytest.mark.parametrize("sizes", [(200, 24, 40), (160, 100, 90)], ids=["tall", "square"])
def test_one_adapter_for_all_rows(backend, ids, sizes):
    """On a CPU the first shape is a product with merged weights, the second is not."""
    device = device_of(backend)
    m, k, n = sizes
    weight, bias, a, b, scaling = make_layer(n, k, (5, 3), device=device)
    which = 0 if ids is None else ids
    tensor = None if ids is None else torch.full((2,), ids, device=device)
    inputs = [torch.randn(2, m // 2, k, device=device), weight, bias, *a, *b]
    upstream = torch.randn(2, m // 2, n, device=device)
    if ids is None:  # the others get no gradient
        inputs = [*inputs[:3], a[0], b[0]]
    count = 1 if ids is None else 2
    settings = (count, scaling[:count], tensor, 0.0, None, upstream)
    actual, same, exact = three_ways(inputs, *settings, backend=backend)
    close(actual, same, exact)
    alone = run(
        [*inputs[:3], a[which], b[which]], 1, scaling[which], None, 0.0, None, upstream, backend
    )
    torch.testing.assert_close(actual[0], alone[0])


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ extension is not built")
def test_merged_weights_are_made_again_for_each_backward():
    """They lie in memory that other layers take in between."""
    x = torch.randn(100, 16)
    layers = [make_layer(n, 16, (3,)) for n in (12, 20, 8)]
    adapters = [leaves(*a, *b) for _, _, a, b, _ in layers]

    def gradients(backend):
        first = x.clone().requires_grad_()
        ys = [
            lora_linear(first, w, a, b, s[0], bias=bias, backend=backend)
            for (w, bias, _, _, s), (a, b) in zip(layers, adapters, strict=True)
        ]
        loss = sum(y.square().sum() for y in ys)
        return torch.autograd.grad(loss, [first, *(t for pair in adapters for t in pair)])

    for mine, other in zip(gradients("cpu"), gradients("reference"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ extension is not built")
def test_merged_weights_of_strided_tensors():
    weight, _, (a,), (b,), _ = make_layer(40, 24, (5,))
    x, upstream = torch.randn(200, 24), torch.randn(200, 40)
    results = []
    for backend in ("cpu", "reference"):
        given = leaves(x, *(t.t().contiguous() for t in (a, b)))
        y = lora_linear(given[0], weight, given[1].t(), given[2].t(), 0.7, backend=backend)
        results.append([y, *torch.autograd.grad(y, given, upstream)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ extension is not built")
@pytest.mark.parametrize("p", [0.1, 2.5 / 65536, 3.5 / 65536])  # up; to even, down and up
def test_the_threshold_of_dropout_rounds_as_python_does(p):
    """Of the draws of 800000 elements some dozen are the threshold itself."""
    eye, x, seed = torch.eye(8), torch.ones(100_000, 8), torch.tensor([11, 3])
    y = lora_linear(x, 0 * eye, eye, eye, 1.0, dropout=p, seed=seed, backend="cpu")
    assert torch.equal(y != 0, philox.keep(100_000, 8, p, seed))


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ extension is not built")
def test_narrowing_to_bfloat16_is_torch_s():
    """Ties go to even, what is too large to inf, and no NaN to a number."""
    ties = 1 + torch.arange(1, 64, 2) * 2**-8
    odd = torch.tensor([0x7FFFFFFF, 0x7F7FFFFF, 0x7F800000, 0x3F808001], dtype=torch.int32)
    values = torch.cat((ties, -ties, odd.view(torch.float32)))
    x, weight = torch.ones(20, 1).bfloat16(), torch.zeros(len(values), 1).bfloat16()
    y = lora_linear(x, weight, torch.ones(1, 1), values[:, None], 1.0, backend="cpu")
    torch.testing.assert_close(y[0], values.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("rows", [3, 90], ids=["few", "many"])
@pytest.mark.parametrize("ids", [None, [1, 1, 1], [0, -1, 1]], ids=["no ids", "one", "mixed"])
def test_a_group_of_any_rows(backend, rows, ids):
    device = device_of(backend)
    x = torch.randn(3, rows, 20, device=device)
    tensor = None if ids is None else torch.tensor(ids, device=device)
    layers = [make_layer(n, 20, ranks, device=device) for n, ranks in [(6, (2, 3)), (10, (4, 1))]]
    upstream = [torch.randn(3, rows, n, device=device) for n in (6, 10)]

    def outputs(name):
        first = x.clone().requires_grad_()
        flat = leaves(*(t for _, _, a, b, _ in layers for t in (*a, *b)))
        projections = [
            Projection(w, flat[4 * i : 4 * i + 2], flat[4 * i + 2 : 4 * i + 4], s, bias)
            for i, (w, bias, _, _, s) in enumerate(layers)
        ]
        ys = lora_linear_group(first, projections, adapter_ids=tensor, backend=name)
        grads = torch.autograd.grad(ys, [first, *flat], upstream, allow_unused=True)
        return [*ys, *(g for g in grads if g is not None)]

    for mine, other in zip(outputs(backend), outputs("reference"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ extension is not built")
def test_threads_do_not_change_a_bit_of_mixed_rows():
    weight, bias, a, b, scaling = make_layer(300, 200, (24, 7, 16))
    inputs = [torch.randn(900, 200), weight, bias, *a, *b]
    ids = torch.randint(-1, 3, (900,))
    upstream = torch.randn(900, 300)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            settings = (3, scaling, ids, 0.2, torch.tensor([3, 4]), upstream)
            results.append(run(inputs, *settings, "cpu")[4:])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("backend", KERNELS)
def test_rows_that_are_off_are_the_base_layer_in_a_mixed_batch(backend):
    device = device_of(backend)
    weight, bias, a, b, scaling = make_layer(50, 64, (16, 16), device=device)
    x = torch.randn(120, 64, device=device)
    ids = torch.randint(-1, 2, (120,), device=device)
    y = lora_linear(x, weight, a, b, scaling, adapter_ids=ids, bias=bias, backend=backend)
    base = F.linear(x, weight, bias)
    off = ids == -1
    if device == "cpu" and backend == "cpu":
        assert torch.equal(y[off], base[off])
    else:
        torch.testing.assert_close(y[off], base[off])
    assert not torch.allclose(y[~off], base[~off])

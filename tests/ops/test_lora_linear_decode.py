"""The CUDA kernel of lora_linear for few rows, which has no backward: decoding only.

It runs where there is a GPU; tests/cuda_on_cpu runs the same tests everywhere.
"""

import pytest
import torch

from hydra_kernels import lora_linear
from tests.numerics import assert_no_worse_than_torch, device_of, fast_backends
from tests.ops.test_lora_linear import make_layer

BACKENDS = [name for name in fast_backends("lora_linear") if name == "cuda"]
HALVES = (torch.float16, torch.bfloat16)

# one of everything; ends of a tile of 16 rows of W and of A; K of one warp's part, of all eight
# warps', and past both; ranks of several adapters in one tile, and all that there may be
LAYERS = [
    (1, 8, (1,)),
    (15, 32, (3, 2)),
    (16, 256, (16,)),
    (17, 264, (10, 17)),
    (50, 1032, (30, 2, 32)),
]


def make(rows, n, k, ranks, dtype, device):
    layer = make_layer(n, k, ranks, dtype, device=device)
    return torch.randn(rows, k, device=device).to(dtype), *layer


def run(x, weight, bias, a, b, scaling, ids, backend):
    return lora_linear(x, weight, a, b, scaling, adapter_ids=ids, bias=bias, backend=backend)


def check(x, weight, bias, a, b, scaling, ids, backend):
    actual = run(x, weight, bias, a, b, scaling, ids, backend)
    same = run(x, weight, bias, a, b, scaling, ids, "reference")
    doubles = [[t.double() for t in some] for some in (a, b)]
    base = None if bias is None else bias.double()
    exact = run(x.double(), weight.double(), base, *doubles, scaling, ids, "reference")
    # one ulp of the largest: the reference rounds more often, and may be lucky
    atol = torch.finfo(x.dtype).eps * exact.abs().max().item()
    assert_no_worse_than_torch(actual, same, exact, atol=atol)
    return actual


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda s: f"N{s[0]}-K{s[1]}-R{s[2]}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_ids(backend, layer, dtype):
    n, k, ranks = layer
    device = device_of(backend)
    for rows in (1, 5, 8, 9, 16, 17, 31, 32):
        x, *rest = make(rows, n, k, ranks, dtype, device)
        ids = torch.randint(-1, len(ranks), (rows,), device=device)
        check(x, *rest, ids, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_rows(backend):
    """Each row is the same, bit for bit, whatever rows are beside it."""
    device = device_of(backend)
    x, *layer = make(32, 33, 72, (8, 4), torch.float16, device)
    ids = torch.arange(32, device=device) % 3 - 1
    together = check(x, *layer, ids, backend)
    for rows in range(1, 32):
        y = run(x[:rows].contiguous(), *layer, ids[:rows], backend)
        assert torch.equal(y, together[:rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_of_ids(backend):
    device = device_of(backend)
    x, *layer = make(24, 21, 40, (8, 4), torch.bfloat16, device)
    x = x.view(4, 6, 40)
    for ids in (None, torch.tensor(1), torch.tensor(-1), torch.tensor([1, -1, 0, 1])):
        check(x, *layer, None if ids is None else ids.to(device), backend)
        if ids is not None:
            check(x, *layer, ids.to(device, torch.int32), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_off(backend):
    """They are the base layer's, bit for bit, and with every row off the adapters are not read."""
    device = device_of(backend)
    x, weight, bias, a, b, scaling = make(20, 40, 64, (16, 24), torch.float16, device)
    off = torch.full((20,), -1, device=device)
    nan = [torch.full_like(t, torch.nan) for t in a], [torch.full_like(t, torch.nan) for t in b]
    base = check(x, weight, bias, a, b, scaling, off, backend)
    assert torch.equal(run(x, weight, bias, *nan, scaling, off, backend), base)
    mixed = off.clone()
    mixed[::2] = 1
    y = run(x, weight, bias, a, b, scaling, mixed, backend)
    assert torch.equal(y[1::2], base[1::2])
    assert not torch.equal(y[::2], base[::2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_launch_after_launch(backend):
    """Tickets and counters begin at zero each time, after rows that are on, off and mixed."""
    device = device_of(backend)
    x, *layer = make(7, 50, 48, (20,), torch.float16, device)
    alike = {}
    for value in (0, -1, 0, -1, -1, 0):
        y = run(x, *layer, torch.tensor(value, device=device), backend)
        assert torch.equal(alike.setdefault(value, y), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias_and_with_strided_factors(backend):
    device = device_of(backend)
    x, weight, _, (a,), (b,), scaling = make(3, 20, 32, (8,), torch.bfloat16, device)
    check(
        x, weight, None, [a.t().contiguous().t()], [b.t().contiguous().t()], scaling, None, backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_what_it_cannot_run(backend):
    device = device_of(backend)
    x, *layer = make(33, 20, 32, (8,), torch.float16, device)
    with pytest.raises(NotImplementedError, match="at most 32 rows"):
        run(x, *layer, None, backend)
    with pytest.raises(NotImplementedError, match="float16 and bfloat16"):
        run(*make(3, 20, 32, (8,), torch.float32, device), None, backend)
    with pytest.raises(NotImplementedError, match="whole 16 bytes"):
        run(*make(3, 20, 36, (8,), torch.float16, device), None, backend)
    with pytest.raises(NotImplementedError, match="at most 64 ranks"):
        two = make(3, 20, 32, (33, 32), torch.float16, device)
        run(*two, torch.tensor(1, device=device), backend)
    with pytest.raises(NotImplementedError, match="has no backward"):
        run(x[:3].requires_grad_(), *layer, None, backend)

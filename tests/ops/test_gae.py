import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_kernels import available_backends, gae
from tests.numerics import assert_no_worse_than_torch, device_of, fast_backends
from tests.ops.token_masks import every_kind, lengths, make_mask, poisoned, rows, seeds

OP = "gae"
BACKENDS = fast_backends(OP)
ALL = list(available_backends(OP))
ATOL = 1.2e-7  # one float32 ulp of an advantage near 1

# one token, a row shorter than a vector, a prime length, more rows than one tile, more than a block
SHAPES = [(1, 1), (2, 3), (6, 127), (19, 33), (7, 1025)]


def make_inputs(B, T, device, dtype=torch.float32):
    mask = every_kind(B, T).to(device)
    rewards, values = torch.randn(2, B, T, dtype=dtype).to(device)
    last_values = torch.randn(B, dtype=dtype).to(device)
    return rewards, values, mask, last_values


def oracle(rewards, values, mask, gamma, lam, last_values=None):
    """Eq. 16 of arXiv:1506.02438 as it is printed: a sum over all later steps for each step."""
    rewards, values = (t.cpu().double().numpy() for t in (rewards, values))
    advantages = np.zeros(mask.shape)
    returns = np.zeros(mask.shape)
    for row in range(mask.shape[0]):
        steps = np.flatnonzero(mask[row].cpu().numpy())
        last = 0.0 if last_values is None else last_values[row].item()
        after = np.append(values[row, steps], last)[1:]
        deltas = rewards[row, steps] + gamma * after - values[row, steps]
        for i, t in enumerate(steps):
            decay = (gamma * lam) ** np.arange(len(steps) - i)
            advantages[row, t] = np.sum(decay * deltas[i:])
            returns[row, t] = advantages[row, t] + values[row, t]
    return advantages, returns


def assert_agrees(actual, expected):
    for got, exact in zip(actual, expected, strict=True):
        error = np.abs(got.cpu().double().numpy() - exact).max(initial=0.0)
        assert error <= 1e-6 * max(1.0, np.abs(exact).max(initial=0.0))


@pytest.mark.parametrize("backend", ALL)
def test_by_hand(backend):
    device = device_of(backend)
    rewards = torch.tensor([[1.0, 2.0], [1.0, 2.0]], device=device)
    values = torch.tensor([[0.5, 1.0], [0.5, 1.0]], device=device)
    mask = torch.ones(2, 2, dtype=torch.bool, device=device)
    last_values = torch.tensor([0.0, 4.0], device=device)  # the second row was cut
    advantages, returns = gae(
        rewards, values, mask, gamma=1.0, lam=0.5, last_values=last_values, backend=backend
    )
    # A_2 = 2 - 1 (+ 4); A_1 = 1 + 1 - 0.5 + 0.5 A_2
    assert advantages.tolist() == [[2.0, 1.0], [4.0, 5.0]]
    assert returns.tolist() == [[2.5, 2.0], [4.5, 6.0]]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"B{s[0]}-T{s[1]}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference(backend, shape):
    rewards, values, mask, last_values = make_inputs(*shape, device_of(backend))
    settings = dict(gamma=0.99, lam=0.95)
    out = gae(rewards, values, mask, last_values=last_values, backend=backend, **settings)
    same = gae(rewards, values, mask, last_values=last_values, backend="reference", **settings)
    doubles = [t.double() for t in (rewards, values, last_values)]
    exact = gae(*doubles[:2], mask, last_values=doubles[2], backend="reference", **settings)
    for actual, plain, truth in zip(out, same, exact, strict=True):
        assert_no_worse_than_torch(actual, plain, truth, atol=ATOL)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    "gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.0, 1.0), (0.99, 0.0)]
)
def test_agrees_with_the_paper(backend, gamma, lam):
    rewards, values, mask, last_values = make_inputs(7, 61, device_of(backend))
    for last in (None, last_values):
        out = gae(rewards, values, mask, gamma=gamma, lam=lam, last_values=last, backend=backend)
        assert_agrees(out, oracle(rewards, values, mask, gamma, lam, last))


@pytest.mark.parametrize("backend", ALL)
@settings(max_examples=15, deadline=None)
@given(rows=rows, T=lengths, lam=st.sampled_from([0.0, 0.95, 1.0]), seed=seeds)
def test_any_mask(backend, rows, T, lam, seed):
    torch.manual_seed(seed)
    device = device_of(backend)
    mask = make_mask(rows, T).to(device)
    rewards, values = torch.randn(2, *mask.shape, device=device)
    last_values = torch.randn(len(rows), device=device)
    out = gae(
        poisoned(rewards, mask),
        poisoned(values, mask, torch.inf),
        mask,
        lam=lam,
        last_values=last_values,
        backend=backend,
    )
    assert_agrees(out, oracle(rewards, values, mask, 1.0, lam, last_values))
    for tensor in out:
        assert not tensor[~mask].any()


@pytest.mark.parametrize("backend", ALL)
def test_a_hole_is_not_a_step(backend):
    """Tokens closed up to the left have the same advantages."""
    device = device_of(backend)
    rewards, values, _, last_values = make_inputs(1, 97, device)
    mask = (torch.rand(1, 97) < 0.6).to(device)
    counted = int(mask.sum())
    out = gae(rewards, values, mask, last_values=last_values, backend=backend)
    closed = gae(
        rewards[mask][None],
        values[mask][None],
        torch.ones(1, counted, dtype=torch.bool, device=device),
        last_values=last_values,
        backend=backend,
    )
    for a, b in zip(out, closed, strict=True):
        torch.testing.assert_close(a[mask][None], b, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ALL)
def test_masked_values_do_not_matter(backend):
    rewards, values, mask, last_values = make_inputs(6, 133, device_of(backend))
    clean = gae(rewards, values, mask, last_values=last_values, backend=backend)
    for poison in (torch.nan, torch.inf, -torch.inf):
        dirty = gae(
            poisoned(rewards, mask, poison),
            poisoned(values, mask, poison),
            mask,
            # of a row without a token that counts, this is not read either
            last_values=poisoned(last_values, mask.any(1), poison),
            backend=backend,
        )
        for a, b in zip(clean, dirty, strict=True):
            assert torch.equal(a, b), poison


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_row(backend, monkeypatch):
    """A row that the GPU backends cut into segments, scanned at the same time."""
    T = 4001
    if backend == "triton":
        from hydra_kernels.backends.triton import gae as kernel

        monkeypatch.setattr(kernel, "BLOCK_T", 128)
        assert kernel.segment_blocks(1, T, 128) * 128 * 4 < T  # at least 4 segments
    device = device_of(backend)
    rewards, values = torch.randn(2, 1, T, device=device)
    mask = (torch.rand(1, T) < 0.7).to(device)
    last_values = torch.ones(1, device=device)
    for lam in (0.95, 1.0):  # the sum of 1.0 reaches over all segments
        out = gae(rewards, values, mask, lam=lam, last_values=last_values, backend=backend)
        same, exact = (
            gae(
                rewards.to(dtype),
                values.to(dtype),
                mask,
                lam=lam,
                last_values=last_values.to(dtype),
                backend="reference",
            )
            for dtype in (torch.float32, torch.float64)
        )
        for actual, plain, truth in zip(out, same, exact, strict=True):
            assert_no_worse_than_torch(actual, plain, truth, atol=ATOL)


@pytest.mark.parametrize("backend", ALL)
def test_half_precision_keeps_a_float32_state(backend):
    """A sum of 1000 rewards of 1 is not representable on the way in bfloat16."""
    device = device_of(backend)
    for dtype in (torch.bfloat16, torch.float16):
        ones = torch.ones(2, 1000, dtype=dtype, device=device)
        mask = torch.ones(2, 1000, dtype=torch.bool, device=device)
        advantages, returns = gae(ones, 0 * ones, mask, lam=1.0, backend=backend)
        assert advantages.dtype == returns.dtype == torch.float32
        expected = torch.arange(1000.0, 0.0, -1.0, device=device).expand(2, -1)
        assert torch.equal(advantages, expected)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_empty(backend, shape):
    device = device_of(backend)
    empty = torch.zeros(shape, device=device)
    advantages, returns = gae(empty, empty, empty.bool(), backend=backend)
    assert advantages.shape == returns.shape == shape


@pytest.mark.parametrize("backend", ALL)
def test_non_contiguous(backend):
    rewards, values, mask, last_values = make_inputs(6, 40, device_of(backend))
    straight = gae(rewards, values, mask, last_values=last_values, backend=backend)
    turned = (t.t().contiguous().t() for t in (rewards, values, mask))
    strided = torch.stack((last_values, last_values), 1)[:, 0]
    for a, b in zip(straight, gae(*turned, last_values=strided, backend=backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ALL)
def test_defaults_are_those_of_the_docstring(backend):
    rewards, values, mask, _ = make_inputs(6, 40, device_of(backend))
    expected = gae(rewards, values, mask, gamma=1.0, lam=0.95, backend=backend)
    for a, b in zip(gae(rewards, values, mask, backend=backend), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ALL)
def test_results_are_constants(backend):
    rewards, values, mask, last_values = make_inputs(2, 5, device_of(backend))
    for t in (rewards, values, last_values):
        t.requires_grad_()
    for out in gae(rewards, values, mask, last_values=last_values, backend=backend):
        assert not out.requires_grad


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built (HYDRA_BUILD=none)")
def test_threads_do_not_change_the_result():
    inputs = make_inputs(40, 1024, "cpu")  # enough tokens to run in parallel
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gae(*inputs[:3], last_values=inputs[3], backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for out in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], out, strict=True))


@pytest.mark.parametrize("backend", ALL)
def test_opcheck(backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    rewards, values, mask, last_values = make_inputs(2, 17, device_of(backend), dtype)
    for last in (None, last_values):
        torch.library.opcheck(
            torch.ops.hydra.gae, (rewards, values, mask, 0.99, 0.95, last, backend)
        )


def test_compiles():
    """fullgraph, as eager to the bit, and new inputs of the same shape do not recompile."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(rewards, values, mask, last_values):
        return gae(rewards, values, mask, gamma=0.99, last_values=last_values)

    for _ in range(2):
        rewards, values, mask, last_values = make_inputs(3, 33, "cpu")
        values.requires_grad_()
        eager = gae(rewards, values, mask, gamma=0.99, last_values=last_values)
        for a, b in zip(step(rewards, values, mask, last_values), eager, strict=True):
            assert torch.equal(a, b) and not a.requires_grad
    assert counter.frame_count == 1


def refusals():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    yield (x, x, mask.int()), {}, ValueError, "mask must be bool, got torch.int32"
    yield (x[0], x[0], mask[0]), {}, ValueError, r"mask must be \(B, T\), got \(3,\)"
    yield (x, x[:, :2], mask), {}, ValueError, r"values must be \(2, 3\).*got \(2, 2\)"
    yield (x, mask, mask), {}, ValueError, "values must be floating-point, got torch.bool"
    yield (x, x.to("meta"), mask), {}, ValueError, "must be on one device, got .*values on meta"
    yield (x, x, mask), {"last_values": x}, ValueError, r"last_values must be \(2,\)"
    far = torch.ones(2, device="meta")
    yield (x, x, mask), {"last_values": far}, ValueError, "got .*last_values on meta"
    yield (x, x, mask), {"lam": far[0]}, ValueError, "lam must be a number, got .* on meta"
    yield (x, x, mask), {"gamma": 1.1}, ValueError, r"gamma must be in \[0, 1\], got 1.1"
    yield (x, x, mask), {"lam": -0.1}, ValueError, r"lam must be in \[0, 1\], got -0.1"
    half = torch.full((2,), 0.5)
    yield (x, x, mask), {"gamma": half}, ValueError, r"gamma must be a number, got \(2,\)"
    yield (x, x, mask), {"backend": "tpu"}, NotImplementedError, "no such backend"
    for backend in BACKENDS:
        doubles = (x.double(), x.double(), mask)
        yield doubles, {"backend": backend}, NotImplementedError, "needs torch.float32"


@pytest.mark.parametrize("args, kwargs, error, message", list(refusals()))
def test_refuses(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        gae(*args, **kwargs)

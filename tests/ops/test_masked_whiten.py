import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_kernels import available_backends, masked_whiten
from tests.numerics import device_of, fast_backends
from tests.ops.token_masks import every_kind, lengths, make_mask, poisoned, rows, seeds

OP = "masked_whiten"
BACKENDS = fast_backends(OP)
ALL = list(available_backends(OP))

# one element, below a vector, a prime length, more than one block of every backend, not (B, T)
SHAPES = [(1, 1), (1, 3), (6, 127), (5, 1709), (7, 3, 5), (11,)]


def oracle(x, mask, shift_mean=True):
    """TRL's masked_whiten from its formula: the unbiased variance is that of the counted elements
    divided by n - 1, and (x - mean) * rsqrt(var + 1e-8), + mean unless shift_mean."""
    x, keep = x.cpu().double().numpy(), mask.cpu().numpy()
    counted = x[keep]
    out = np.zeros(x.shape)
    if counted.size:
        mean = counted.sum() / counted.size
        var = ((counted - mean) ** 2).sum() / max(counted.size - 1, 1)
        out[keep] = (counted - mean) / np.sqrt(var + 1e-8) + (0.0 if shift_mean else mean)
    return out


def assert_agrees(actual, expected):
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.cpu().double().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_by_hand(backend):
    device = device_of(backend)
    x = torch.tensor([1.0, 99.0, 3.0], device=device)
    mask = torch.tensor([True, False, True], device=device)  # mean 2, variance 2
    half = 0.5**0.5
    out = masked_whiten(x, mask, backend=backend)
    torch.testing.assert_close(out.cpu(), torch.tensor([-half, 0.0, half]))
    out = masked_whiten(x, mask, shift_mean=False, backend=backend)
    torch.testing.assert_close(out.cpu(), torch.tensor([2 - half, 0.0, 2 + half]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("backend", ALL)
def test_agrees_with_the_formula(backend, shift_mean, shape):
    device = device_of(backend)
    x = 3 * torch.randn(shape, device=device) + 2
    mask = (torch.rand(shape) < 0.7).to(device)
    out = masked_whiten(x, mask, shift_mean=shift_mean, backend=backend)
    assert_agrees(out, oracle(x, mask, shift_mean))


@pytest.mark.parametrize("backend", ALL)
def test_a_mean_that_is_small_beside_the_values(backend):
    """It is what remains in the output when it is not taken off: whitened values are near 1."""
    x = torch.tensor([[1.3e20, 7e19, -2.1e20, 3e17, 9.9e18]], device=device_of(backend))
    mask = torch.ones_like(x, dtype=torch.bool)
    out = masked_whiten(x, mask, shift_mean=False, backend=backend)
    assert_agrees(out, oracle(x, mask, shift_mean=False))


@pytest.mark.parametrize("backend", ALL)
@settings(max_examples=20, deadline=None)
@given(
    rows=rows,
    T=lengths,
    offset=st.sampled_from([0.0, 1e3, -1e6]),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e20]),  # 1e20: squares that overflow float32
    shift_mean=st.booleans(),
    seed=seeds,
)
def test_finite_in_finite_out(backend, rows, T, offset, scale, shift_mean, seed):
    torch.manual_seed(seed)
    device = device_of(backend)
    mask = make_mask(rows, T).to(device)
    x = offset + scale * torch.randn(mask.shape, device=device)
    out = masked_whiten(poisoned(x, mask), mask, shift_mean=shift_mean, backend=backend)
    assert torch.isfinite(out).all()
    assert not out[~mask].any()
    expected = oracle(x, mask, shift_mean)
    np.testing.assert_allclose(out.cpu().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("value", [0.0, -7.3, 1e30])
def test_one_counted_element(backend, value):
    """It has no unbiased variance; TRL's formula would divide by n - 1 = 0."""
    device = device_of(backend)
    x = torch.full((2, 9), torch.nan, device=device)
    x[1, 4] = value
    out = masked_whiten(x, ~x.isnan(), backend=backend)
    assert not out.any() and not out.isnan().any()
    out = masked_whiten(x, ~x.isnan(), shift_mean=False, backend=backend)
    assert out[1, 4].item() == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize("backend", ALL)
def test_a_mean_far_from_zero(backend):
    """Sums of squares about zero would leave no digit of this variance in float32."""
    device = device_of(backend)
    x = (1e4 + torch.randn(3, 1500)).to(device)
    mask = every_kind(3, 1500).to(device)
    assert_agrees(masked_whiten(x, mask, backend=backend), oracle(x, mask))


@pytest.mark.parametrize("backend", ALL)
def test_masked_values_do_not_matter(backend):
    device = device_of(backend)
    x, mask = torch.randn(6, 133, device=device), every_kind(6, 133).to(device)
    clean = masked_whiten(x, mask, backend=backend)
    for poison in (torch.nan, torch.inf, -torch.inf):
        dirty = masked_whiten(poisoned(x, mask, poison), mask, backend=backend)
        assert torch.equal(clean, dirty), poison


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("backend", ALL)
def test_reduce_whitens_over_all_processes(backend, shift_mean):
    """Three numbers are summed over processes, here two parts of one batch of uneven sizes."""
    device = device_of(backend)
    x = (20 + torch.randn(5, 200)).to(device)
    mask = every_kind(5, 200).to(device)
    parts = [(x[:1], mask[:1]), (x[1:], mask[1:])]
    sent = []
    for part in parts:
        masked_whiten(*part, reduce=lambda t: sent.append(t) or t, backend=backend)
    assert len(sent) == 2 and all(t.shape == (3,) for t in sent)
    total = sent[0] + sent[1]
    for part, whole in zip(parts, oracle_parts(x, mask, shift_mean), strict=True):
        out = masked_whiten(*part, shift_mean=shift_mean, reduce=lambda t: total, backend=backend)
        assert_agrees(out, whole)


def oracle_parts(x, mask, shift_mean):
    whole = oracle(x, mask, shift_mean)
    return whole[:1], whole[1:]


@pytest.mark.parametrize("backend", ALL)
def test_a_constant_in_every_process(backend):
    """The difference of its sums of squares may round to less than 0."""
    for value in torch.logspace(2, 6, 50).tolist():
        x = torch.full((1, 1001), value, device=device_of(backend))  # its sums are not exact
        out = masked_whiten(x, x > 0, reduce=lambda t: 3 * t, backend=backend)
        assert torch.isfinite(out).all() and out.abs().max() < 1, value


@pytest.mark.parametrize("backend", ALL)
def test_a_reduction_in_float32(backend):
    """Some transports know no float64: kernels read float64 all the same."""
    x = torch.randn(5, 200, device=device_of(backend))
    mask = every_kind(5, 200).to(x.device)
    out = masked_whiten(x, mask, reduce=lambda t: t.float(), backend=backend)
    torch.testing.assert_close(out, masked_whiten(x, mask, backend=backend), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ALL)
def test_a_process_without_tokens_takes_the_others_moments(backend):
    x = torch.randn(2, 5, device=device_of(backend))
    others = torch.tensor([10.0, 20.0, 50.0], dtype=torch.float64, device=x.device)
    out = masked_whiten(x, x.isnan(), reduce=lambda t: t + others, backend=backend)
    assert not out.any()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_empty(backend, shape):
    x = torch.zeros(shape, device=device_of(backend))
    assert masked_whiten(x, x.bool(), backend=backend).shape == shape


@pytest.mark.parametrize("backend", ALL)
def test_non_contiguous_half_and_constant(backend):
    device = device_of(backend)
    x, mask = torch.randn(6, 40, device=device), every_kind(6, 40).to(device)
    straight = masked_whiten(x, mask, backend=backend)
    turned = masked_whiten(x.t().contiguous().t(), mask.t().contiguous().t(), backend=backend)
    assert torch.equal(straight, turned)
    half = x.bfloat16().requires_grad_()
    out = masked_whiten(half, mask, backend=backend)
    assert out.dtype == torch.float32 and not out.requires_grad
    assert torch.equal(out, masked_whiten(half.float(), mask, backend=backend))


@pytest.mark.parametrize("backend", ALL)
def test_repeats_bit_for_bit(backend):
    device = device_of(backend)
    x, mask = torch.randn(5, 5000, device=device), every_kind(5, 5000).to(device)
    first = masked_whiten(x, mask, backend=backend)
    assert torch.equal(first, masked_whiten(x, mask, backend=backend))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built (HYDRA_BUILD=none)")
def test_threads_do_not_change_the_result():
    x, mask = torch.randn(40, 1024), every_kind(40, 1024)  # enough tokens to run in parallel
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(masked_whiten(x, mask, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], out) for out in results[1:])


@pytest.mark.parametrize("backend", ALL)
def test_opcheck(backend):
    device = device_of(backend)
    dtype = torch.float64 if backend == "reference" else torch.float32
    x, mask = torch.randn(2, 17, device=device, dtype=dtype), every_kind(2, 17).to(device)
    torch.library.opcheck(torch.ops.hydra.masked_whiten_moments, (x, mask, backend))
    moments = torch.tensor([3.0, 0.5, 2.0], dtype=torch.float64, device=device)
    torch.library.opcheck(torch.ops.hydra.masked_whiten, (x, mask, moments, True, backend))


def test_compiles():
    """fullgraph with a reduction in the middle, and as eager to the bit."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, mask):
        return masked_whiten(x, mask), masked_whiten(x, mask, reduce=lambda t: 2 * t)

    x, mask = torch.randn(3, 33), every_kind(3, 33)
    whole, doubled = step(x, mask)
    assert torch.equal(whole, masked_whiten(x, mask))
    assert torch.equal(doubled, masked_whiten(x, mask, reduce=lambda t: 2 * t))


def refusals():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    yield (x, mask.int()), {}, ValueError, "mask must be bool, got torch.int32"
    yield (x[:1], mask), {}, ValueError, r"x must be \(2, 3\).*got \(1, 3\)"
    yield (x.int(), mask), {}, ValueError, "x must be floating-point, got torch.int32"
    yield (x.to("meta"), mask), {}, ValueError, "must be on one device"
    yield (x, mask), {"backend": "tpu"}, NotImplementedError, "no such backend"


@pytest.mark.parametrize("args, kwargs, error, message", list(refusals()))
def test_refuses(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        masked_whiten(*args, **kwargs)

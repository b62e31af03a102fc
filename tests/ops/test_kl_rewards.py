import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_kernels import available_backends, kl_rewards
from tests.numerics import device_of, fast_backends
from tests.ops.token_masks import every_kind, lengths, make_mask, poisoned, rows, seeds

OP = "kl_rewards"
BACKENDS = fast_backends(OP)
ALL = list(available_backends(OP))
ESTIMATORS = ("k1", "k2", "k3", "exact")

# one token, a row shorter than a vector, a prime length, more than one block of every backend
SHAPES = [(1, 1), (2, 3), (6, 127), (7, 1025)]


def make_inputs(B, T, device, spread=1.0):
    mask = every_kind(B, T).to(device)
    ref_logprobs = -5 * torch.rand(B, T, device=device)
    logprobs = ref_logprobs + spread * torch.randn(B, T, device=device)
    kl = torch.rand(B, T, device=device)
    return torch.randn(B, device=device), logprobs, ref_logprobs, mask, kl


def run(scores, logprobs, ref_logprobs, mask, kl, estimator, **kwargs):
    kwargs = {"kl_coef": 0.1, **kwargs}
    kl = kl if estimator == "exact" else None
    return kl_rewards(scores, logprobs, ref_logprobs, mask, estimator=estimator, kl=kl, **kwargs)


def oracle(scores, logprobs, ref_logprobs, mask, kl, estimator, kl_coef=0.1):
    """Token by token in Python floats. With x ~ q and r = p(x)/q(x), Schulman's "Approximating KL
    Divergence" estimates KL[q, p] by k1 = -log r, k2 = (log r)^2 / 2, k3 = (r - 1) - log r."""
    keep = mask.cpu().numpy()
    rewards = np.zeros(mask.shape)
    for row, t in zip(*np.nonzero(keep), strict=True):
        log_r = ref_logprobs[row, t].double().item() - logprobs[row, t].double().item()
        estimate = {
            "k1": lambda x: -x,
            "k2": lambda x: x * x / 2,
            "k3": lambda x: math.exp(min(x, 60.0)) - 1 - x,
            "exact": lambda x: kl[row, t].item(),  # noqa: B023  called at once
        }[estimator](log_r)
        rewards[row, t] = -kl_coef * estimate
        if not keep[row, t + 1 :].any():
            rewards[row, t] += scores[row].item()
    return rewards


def assert_agrees(actual, expected):
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.cpu().double().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_by_hand(backend):
    device = device_of(backend)
    # d = logprobs - ref = 2, then 0, then masked; r = e^-2
    logprobs = torch.tensor([[-1.0, -1.0, 9.0]], device=device)
    ref_logprobs = torch.tensor([[-3.0, -1.0, 5.0]], device=device)
    mask = torch.tensor([[True, True, False]], device=device)
    scores = torch.tensor([5.0], device=device)
    for estimator, kl in (("k1", 2.0), ("k2", 2.0), ("k3", math.exp(-2) - 1 + 2)):
        rewards = kl_rewards(
            scores,
            logprobs,
            ref_logprobs,
            mask,
            kl_coef=0.5,
            estimator=estimator,
            backend=backend,
        )
        expected = torch.tensor([[-0.5 * kl, 5.0, 0.0]])
        torch.testing.assert_close(rewards.cpu(), expected, msg=estimator)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"B{s[0]}-T{s[1]}")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("backend", ALL)
def test_agrees_with_the_formulas(backend, estimator, shape):
    inputs = make_inputs(*shape, device_of(backend), spread=0.3)
    assert_agrees(run(*inputs, estimator, backend=backend), oracle(*inputs, estimator))


@pytest.mark.parametrize("backend", ALL)
@settings(max_examples=20, deadline=None)
@given(
    rows=rows,
    T=lengths,
    estimator=st.sampled_from(ESTIMATORS),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 300.0]),  # 300: ratios that overflow float32
    seed=seeds,
)
def test_finite_in_finite_out(backend, rows, T, estimator, spread, seed):
    torch.manual_seed(seed)
    device = device_of(backend)
    scores, logprobs, ref_logprobs, _, kl = make_inputs(len(rows), T, device, spread=spread)
    mask = make_mask(rows, T).to(device)
    rewards = run(
        poisoned(scores, mask.any(1)),
        poisoned(logprobs, mask),
        poisoned(ref_logprobs, mask, torch.inf),
        mask,
        poisoned(kl, mask),
        estimator,
        backend=backend,
    )
    assert torch.isfinite(rewards).all()
    assert not rewards[~mask].any()
    expected = oracle(scores, logprobs, ref_logprobs, mask, kl, estimator)
    # the difference of two float32 near 300 is known to 3e-5, which k3 puts into an exponent
    tolerance = 1e-6 if spread < 300.0 else 1e-4
    np.testing.assert_allclose(rewards.cpu().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_k3_near_zero_keeps_its_digits(backend):
    """exp(d) - 1 - d is d^2 / 2 for a small d, far below the rounding of exp(d)."""
    d = torch.logspace(-4, 0.3, 500).repeat(2, 1) * torch.tensor([[1.0], [-1.0]])
    d = d.to(device_of(backend))
    mask = torch.ones_like(d, dtype=torch.bool)
    zeros = torch.zeros_like(d)
    kl = kl_rewards(zeros[:, 0], zeros, d, mask, kl_coef=-1.0, estimator="k3", backend=backend)
    exact = torch.expm1(d.double()) - d.double()
    torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("backend", ALL)
def test_masked_values_do_not_matter(backend):
    scores, logprobs, ref_logprobs, mask, kl = make_inputs(6, 133, device_of(backend))
    for estimator in ESTIMATORS:
        clean = run(scores, logprobs, ref_logprobs, mask, kl, estimator, backend=backend)
        for poison in (torch.nan, torch.inf, -torch.inf):
            dirty = run(
                poisoned(scores, mask.any(1), poison),
                *(poisoned(t, mask, poison) for t in (logprobs, ref_logprobs)),
                mask,
                poisoned(kl, mask, poison),
                estimator,
                backend=backend,
            )
            assert torch.equal(clean, dirty), (estimator, poison)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_empty(backend, shape):
    x = torch.zeros(shape, device=device_of(backend))
    rewards = kl_rewards(x.new_zeros(shape[0]), x, x, x.bool(), kl_coef=0.1, backend=backend)
    assert rewards.shape == shape


@pytest.mark.parametrize("backend", ALL)
def test_non_contiguous_and_half(backend):
    scores, logprobs, ref_logprobs, mask, _ = make_inputs(6, 40, device_of(backend))
    straight = kl_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.1, backend=backend)
    turned = (t.t().contiguous().t() for t in (logprobs, ref_logprobs, mask))
    strided = torch.stack((scores, scores), 1)[:, 0]
    again = kl_rewards(strided, *turned, kl_coef=0.1, backend=backend)
    assert torch.equal(straight, again)
    half = logprobs.bfloat16()
    out = kl_rewards(scores, half, ref_logprobs, mask, kl_coef=0.1, backend=backend)
    widened = kl_rewards(scores, half.float(), ref_logprobs, mask, kl_coef=0.1, backend=backend)
    assert out.dtype == torch.float32 and torch.equal(out, widened)


@pytest.mark.parametrize("backend", ALL)
def test_exact_needs_no_logprobs_and_results_are_constants(backend):
    scores, _, _, mask, kl = make_inputs(3, 9, device_of(backend))
    kl.requires_grad_()
    rewards = kl_rewards(
        scores, None, None, mask, kl_coef=0.1, estimator="exact", kl=kl, backend=backend
    )
    assert not rewards.requires_grad
    assert_agrees(rewards, oracle(scores, kl, kl, mask, kl, "exact"))
    unread = kl_rewards(
        scores, mask, kl.double()[:1], mask, kl_coef=0.1, estimator="exact", kl=kl, backend=backend
    )
    assert torch.equal(unread, rewards)


@pytest.mark.parametrize("backend", ALL)
def test_a_coefficient_in_a_tensor(backend):
    inputs = make_inputs(2, 9, device_of(backend))[:4]
    results = [kl_rewards(*inputs, kl_coef=c, backend=backend) for c in (0.5, torch.tensor(0.5))]
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", ALL)
def test_opcheck(backend):
    scores, logprobs, ref_logprobs, mask, kl = make_inputs(2, 17, device_of(backend))
    if backend == "reference":
        scores, logprobs, ref_logprobs, kl = (
            t.double() for t in (scores, logprobs, ref_logprobs, kl)
        )
    op = torch.ops.hydra.kl_rewards
    torch.library.opcheck(op, (scores, logprobs, ref_logprobs, mask, 0.1, "k3", None, backend))
    torch.library.opcheck(op, (scores, None, None, mask, 0.1, "exact", kl, backend))


def test_compiles():
    """fullgraph, as eager to the bit, and new inputs of the same shape do not recompile."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(scores, logprobs, ref_logprobs, mask):
        return kl_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.1)

    for _ in range(2):
        inputs = make_inputs(3, 33, "cpu")[:4]
        assert torch.equal(step(*inputs), kl_rewards(*inputs, kl_coef=0.1))
    assert counter.frame_count == 1


def refusals():
    x, mask, scores = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2)
    yield (scores, x, x, mask.float()), {}, ValueError, "mask must be bool, got torch.float32"
    yield (x, x, x, mask), {}, ValueError, r"scores must be \(2,\)"
    yield (scores, x, x[:1], mask), {}, ValueError, r"ref_logprobs must be \(2, 3\)"
    yield (scores, x.long(), x, mask), {}, ValueError, "logprobs must be floating-point"
    yield (scores, x, None, mask), {}, ValueError, "'k1' needs logprobs and ref_logprobs"
    yield (scores, x, x.to("meta"), mask), {}, ValueError, "must be on one device"
    yield (scores, x, x, mask), {"estimator": "k4"}, ValueError, "one of k1, k2, k3, exact"
    yield (scores, x, x, mask), {"estimator": "exact"}, ValueError, "'exact' needs kl"
    yield (scores, x, x, mask), {"kl": x}, ValueError, "kl is read only by estimator 'exact'"
    yield (scores, None, x, mask), {}, ValueError, "'k1' needs logprobs and ref_logprobs"
    yield (scores[0], x[0], x[0], mask[0]), {}, ValueError, r"mask must be \(B, T\), got \(3,\)"
    exact = (scores, None, None, mask)
    for kl, message in ((x[:1], r"kl must be \(2, 3\)"), (x.to("meta"), "must be on one device")):
        yield exact, {"estimator": "exact", "kl": kl}, ValueError, message
    inf = float("inf")
    yield (scores, x, x, mask), {"kl_coef": -inf}, ValueError, "kl_coef must be finite, got -inf"
    nan = float("nan")
    yield (scores, x, x, mask), {"kl_coef": nan}, ValueError, "kl_coef must be finite, got nan"
    two = torch.ones(2)
    yield (scores, x, x, mask), {"kl_coef": two}, ValueError, r"kl_coef must be a number, got \(2,"
    yield (scores, x, x, mask), {"backend": "tpu"}, NotImplementedError, "no such backend"


@pytest.mark.parametrize("args, kwargs, error, message", list(refusals()))
def test_refuses(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        kl_rewards(*args, **{"kl_coef": 0.1, **kwargs})

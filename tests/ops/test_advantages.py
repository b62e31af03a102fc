import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_kernels import advantages, available_backends, gae, kl_rewards, masked_whiten
from hydra_kernels.backends import registry
from tests.numerics import device_of, fast_backends
from tests.ops.token_masks import every_kind, lengths, make_mask, poisoned, rows, seeds

OP = "advantages"
BACKENDS = fast_backends(OP)
ALL = list(available_backends(OP))
ESTIMATORS = ("k1", "k2", "k3", "exact")


def make_inputs(mask):
    """Scores, two log-probabilities, values, the mask; what does not count is NaN."""
    B, T = mask.shape
    ref_logprobs = -5 * torch.rand(B, T, device=mask.device)
    logprobs = ref_logprobs + 0.3 * torch.randn(B, T, device=mask.device)
    values = torch.randn(B, T, device=mask.device)
    scores = poisoned(torch.randn(B, device=mask.device), mask.any(1))
    return scores, *(poisoned(t, mask) for t in (logprobs, ref_logprobs, values)), mask


def step_by_step(
    scores,
    logprobs,
    ref_logprobs,
    values,
    mask,
    *,
    kl_coef,
    estimator="k1",
    kl=None,
    gamma=1.0,
    lam=0.95,
    last_values=None,
    whiten=True,
    whiten_rewards=False,
    reduce=None,
):
    """The three ops of the reference in float64, which have their own oracles."""
    wide = [None if t is None else t.double() for t in (scores, logprobs, ref_logprobs, values, kl)]
    rewards = kl_rewards(*wide[:3], mask, kl_coef=kl_coef, estimator=estimator, kl=wide[4])
    if whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False, reduce=reduce)
    last = None if last_values is None else last_values.double()
    advantage, returns = gae(rewards, wide[3], mask, gamma=gamma, lam=lam, last_values=last)
    if whiten:
        advantage = masked_whiten(advantage, mask, reduce=reduce)
    return advantage, returns, rewards


def assert_agrees(actual, expected):
    for name, exact in zip(("advantages", "returns", "rewards"), expected, strict=True):
        got = getattr(actual, name)
        assert got.dtype == torch.float32
        tolerance = 1e-6 * max(1.0, exact.abs().max().item() if exact.numel() else 1.0)
        torch.testing.assert_close(got.double(), exact, rtol=0.0, atol=2 * tolerance, msg=name)


@pytest.mark.parametrize("backend", ALL)
def test_by_hand(backend):
    device = device_of(backend)
    mask = torch.tensor([[True, True, False]], device=device)
    out = advantages(
        torch.tensor([2.0], device=device),
        torch.tensor([[-1.0, -1.0, 0.0]], device=device),
        torch.tensor([[-2.0, -1.0, 0.0]], device=device),
        torch.tensor([[0.5, 1.0, 7.0]], device=device),
        mask,
        kl_coef=0.5,
        lam=0.5,
        whiten=False,
        backend=backend,
    )
    # rewards -0.5 * 1 and 2; A_2 = 2 - 1, A_1 = -0.5 + 1 - 0.5 + 0.5 A_2
    assert out.rewards.tolist() == [[-0.5, 2.0, 0.0]]
    assert out.advantages.tolist() == [[0.5, 1.0, 0.0]]
    assert out.returns.tolist() == [[1.0, 2.0, 0.0]]


# one token, a prime length, more rows than one tile, more than one block
@pytest.mark.parametrize("shape", [(1, 1), (6, 127), (19, 33), (7, 1025)], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_three_ops(backend, estimator, shape):
    inputs = make_inputs(every_kind(*shape).to(device_of(backend)))
    mask = inputs[-1]
    kl = poisoned(torch.rand(shape, device=mask.device), mask) if estimator == "exact" else None
    last_values = poisoned(torch.randn(shape[0], device=mask.device), mask.any(1))
    settings = dict(kl_coef=0.1, estimator=estimator, kl=kl, last_values=last_values)
    expected = step_by_step(*inputs, **settings)
    assert_agrees(advantages(*inputs, **settings, backend=backend), expected)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("whiten_rewards", [True, False])
def test_whitening_is_a_choice(backend, whiten, whiten_rewards):
    inputs = make_inputs(every_kind(6, 50).to(device_of(backend)))
    last_values = torch.randn(6, device=inputs[-1].device)
    settings = dict(kl_coef=0.1, estimator="k3", gamma=0.9, lam=0.8, last_values=last_values)
    settings |= dict(whiten=whiten, whiten_rewards=whiten_rewards)
    expected = step_by_step(*inputs, **settings)
    assert_agrees(advantages(*inputs, **settings, backend=backend), expected)


@pytest.mark.parametrize("backend", ALL)
def test_each_step_runs_on_the_backend_named(backend, monkeypatch):
    asked, select = [], registry.select
    monkeypatch.setattr(registry, "select", lambda op, b, *t: asked.append(b) or select(op, b, *t))
    inputs = make_inputs(every_kind(6, 50).to(device_of(backend)))
    for whiten_rewards, steps in ((False, 1), (True, 4)):
        asked.clear()
        advantages(*inputs, kl_coef=0.1, whiten_rewards=whiten_rewards, backend=backend)
        assert asked == [backend] * steps


@pytest.mark.parametrize("backend", ALL)
def test_exact_does_not_look_at_logprobs(backend):
    *inputs, mask = make_inputs(every_kind(6, 50).to(device_of(backend)))
    settings = dict(kl_coef=0.1, estimator="exact", kl=torch.rand_like(inputs[1]), backend=backend)
    without = advantages(inputs[0], None, None, inputs[3], mask, **settings)
    unread = advantages(inputs[0], mask, inputs[1].double()[:1], inputs[3], mask, **settings)
    assert all(torch.equal(a, b) for a, b in zip(without, unread, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(rows=rows, T=lengths, estimator=st.sampled_from(ESTIMATORS[:3]), seed=seeds)
def test_any_mask(backend, rows, T, estimator, seed):
    torch.manual_seed(seed)
    inputs = make_inputs(make_mask(rows, T).to(device_of(backend)))
    out = advantages(*inputs, kl_coef=0.1, estimator=estimator, whiten=False, backend=backend)
    expected = step_by_step(*inputs, kl_coef=0.1, estimator=estimator, whiten=False)
    assert_agrees(out, expected)
    for tensor in out:
        assert torch.isfinite(tensor).all() and not tensor[~inputs[-1]].any()


@pytest.mark.parametrize("backend", ALL)
def test_reduce(backend):
    """Called with three numbers, once for each whitening."""
    inputs = make_inputs(every_kind(6, 50).to(device_of(backend)))
    for whiten_rewards, calls in ((False, 1), (True, 2)):
        seen = []

        def reduce(t, seen=seen):
            seen.append(t.shape)
            return t + t.new_tensor([5.0, 10.0, 30.0])  # another process

        settings = dict(kl_coef=0.1, whiten_rewards=whiten_rewards, reduce=reduce)
        out = advantages(*inputs, **settings, backend=backend)
        assert seen == [(3,)] * calls
        assert_agrees(out, step_by_step(*inputs, **settings))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_empty(backend, shape):
    inputs = make_inputs(torch.zeros(shape, dtype=torch.bool, device=device_of(backend)))
    for tensor in advantages(*inputs, kl_coef=0.1, backend=backend):
        assert tensor.shape == shape


@pytest.mark.parametrize("backend", ALL)
def test_non_contiguous_half_and_constant(backend):
    inputs = make_inputs(every_kind(6, 40).to(device_of(backend)))
    straight = advantages(*inputs, kl_coef=0.1, backend=backend)
    turned = [t.t().contiguous().t() if t.dim() == 2 else t for t in inputs]
    again = advantages(*turned, kl_coef=0.1, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))
    half = [t.bfloat16().requires_grad_() if t.is_floating_point() else t for t in inputs]
    widened = [t.float() if t.is_floating_point() else t for t in half]
    out = advantages(*half, kl_coef=0.1, backend=backend)
    for a, b in zip(out, advantages(*widened, kl_coef=0.1, backend=backend), strict=True):
        assert torch.equal(a, b) and not a.requires_grad


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built (HYDRA_BUILD=none)")
def test_threads_do_not_change_the_result():
    inputs = make_inputs(every_kind(40, 1024))  # enough tokens to run in parallel
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(advantages(*inputs, kl_coef=0.1, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for out in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], out, strict=True))


@pytest.mark.parametrize("backend", ALL)
def test_opcheck(backend):
    inputs = make_inputs(torch.ones(2, 17, dtype=torch.bool, device=device_of(backend)))
    if backend == "reference":
        inputs = [t.double() if t.is_floating_point() else t for t in inputs]
    last_values = inputs[0].clone()
    args = (*inputs, 0.1, "k3", None, 1.0, 0.95, last_values, backend)
    torch.library.opcheck(torch.ops.hydra.advantages, args)


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_compiles(whiten_rewards):
    """fullgraph, and as eager to the bit."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(*inputs):
        return advantages(*inputs, kl_coef=0.1, whiten_rewards=whiten_rewards)

    inputs = make_inputs(every_kind(6, 33))
    eager = advantages(*inputs, kl_coef=0.1, whiten_rewards=whiten_rewards)
    for a, b in zip(step(*inputs), eager, strict=True):
        assert torch.equal(a, b)


def refusals():
    scores, x, mask = torch.zeros(2), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    yield (scores, x, x, x, mask.int()), {}, ValueError, "advantages: mask must be bool"
    yield (scores, x, x, x[:1], mask), {}, ValueError, r"values must be \(2, 3\)"
    yield (scores, None, x, x, mask), {}, ValueError, "'k1' needs logprobs and ref_logprobs"
    yield (scores, x, x, x, mask), {"estimator": "exact"}, ValueError, "'exact' needs kl"
    yield (scores, x, x, x, mask), {"lam": 2.0}, ValueError, r"lam must be in \[0, 1\]"
    yield (scores, x, x, x, mask), {"last_values": x}, ValueError, r"last_values must be \(2,\)"
    yield (scores, x, x, x.to("meta"), mask), {}, ValueError, "must be on one device"
    far = scores.to("meta")
    yield (scores, x, x, x, mask), {"last_values": far}, ValueError, "last_values on meta"
    yield (scores, x, x, x, mask), {"kl_coef": torch.inf}, ValueError, "kl_coef must be finite"
    yield (scores, x, x, x, mask), {"backend": "tpu"}, NotImplementedError, "no such backend"


@pytest.mark.parametrize("args, kwargs, error, message", list(refusals()))
def test_refuses(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        advantages(*args, **{"kl_coef": 0.1, **kwargs})

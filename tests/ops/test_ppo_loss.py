import itertools
import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_kernels import PPOLoss, available_backends, ppo_loss
from hydra_kernels.backends.reference import ppo_loss as reference
from tests.numerics import assert_no_worse_than_torch, device_of, fast_backends

OP = "ppo_loss"
BACKENDS = fast_backends(OP)
ALL = list(available_backends(OP))
ATOL = 1.2e-7  # one float32 ulp of a loss near 1
DIFFERENTIABLE = ("logprobs", "values", "entropy", "kl")
COEFS = dict(cliprange=0.2, cliprange_value=0.3, vf_coef=0.5, ent_coef=0.01, kl_coef=0.05)

# one token, a row shorter than a vector, a prime length, more than one block of every backend
SHAPES = [(1, 1), (1, 3), (3, 127), (2, 1025)]


def make_inputs(shape, device, keep=0.7, dtype=torch.float32):
    def normal():
        return torch.randn(shape, device=device, dtype=dtype)

    old_logprobs = -torch.rand(shape, device=device, dtype=dtype) * 5
    return {
        # 0.3: half of the ratios leave [0.8, 1.2]
        "logprobs": old_logprobs + 0.3 * normal(),
        "values": normal(),
        "old_logprobs": old_logprobs,
        "old_values": normal(),  # two thirds of the values leave old +- 0.3
        "advantages": normal(),
        "returns": normal(),
        "entropy": torch.rand(shape, device=device, dtype=dtype),
        "kl": torch.rand(shape, device=device, dtype=dtype),
        "mask": torch.rand(shape, device=device) < keep,
    }


def to_double(inputs):
    return {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}


def run(inputs, upstream=None, **kwargs):
    """The nine statistics, and the gradients under a random upstream of the five losses."""
    leaves = {n: inputs[n].detach().clone().requires_grad_() for n in DIFFERENTIABLE}
    out = ppo_loss(**{**inputs, **leaves}, **{**COEFS, **kwargs})
    if upstream is None:
        upstream = torch.ones(1)
    total = sum(g.to(t) * t for g, t in zip(upstream, out[:5], strict=False))
    grads = torch.autograd.grad(total, list(leaves.values()))
    return [t.detach() for t in out], list(grads)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"B{s[0]}-T{s[1]}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference(backend, shape):
    inputs = make_inputs(shape, device_of(backend))
    upstream = torch.randn(5)
    out, grads = run(inputs, upstream, backend=backend)
    out_32, grads_32 = run(inputs, upstream, backend="reference")
    out_64, grads_64 = run(to_double(inputs), upstream.double(), backend="reference")
    for actual, same, exact in zip(out + grads, out_32 + grads_32, out_64 + grads_64, strict=True):
        assert_no_worse_than_torch(actual, same, exact, atol=ATOL)


@pytest.mark.parametrize("backend", ALL)
def test_by_hand(backend):
    """r = e is clipped to 1.2 where A > 0, and kept where A < 0."""
    device = device_of(backend)
    logprobs = torch.tensor([[1.0, 1.0, 9.0]], device=device, requires_grad=True)
    # v moves 0.5 from 0, clipped to 0.2: |0.2 - 1| > |0.5 - 1|; then a step that is not clipped
    values = torch.tensor([[0.5, 0.1, 9.0]], device=device, requires_grad=True)
    zeros = torch.zeros(1, 3, device=device)
    out = ppo_loss(
        logprobs,
        values,
        old_logprobs=zeros,
        old_values=zeros,
        advantages=torch.tensor([[1.0, -1.0, 5.0]], device=device),
        returns=torch.tensor([[1.0, 0.0, 5.0]], device=device),
        mask=torch.tensor([[True, True, False]], device=device),
        vf_coef=0.5,
        backend=backend,
    )
    e = math.e
    expected = PPOLoss(
        loss=(-1.2 + e) / 2 + 0.5 * (0.32 + 0.005) / 2,
        policy_loss=(-1.2 + e) / 2,
        value_loss=(0.5 * 0.64 + 0.5 * 0.01) / 2,
        entropy=0.0,
        kl=0.0,
        approx_kl=e - 2,
        clipfrac=0.5,
        vf_clipfrac=0.5,
        ratio=e,
    )
    for name, got in out._asdict().items():
        assert got.item() == pytest.approx(getattr(expected, name), rel=1e-6, abs=1e-7), name
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad.cpu(), torch.tensor([[0.0, e / 2, 0.0]]))
    torch.testing.assert_close(values.grad.cpu(), torch.tensor([[0.0, 0.025, 0.0]]))


def oracle(inputs, cliprange, cliprange_value, vf_coef, ent_coef, kl_coef):
    """Token by token in Python floats, from eq. 7 of arXiv:1707.06347 as it is printed."""
    arrays = {n: t.cpu().double().numpy().ravel() for n, t in inputs.items() if n != "mask"}
    keep = inputs["mask"].cpu().numpy().ravel()
    surrogate, value = [], []
    for i in np.flatnonzero(keep):
        r = math.exp(arrays["logprobs"][i] - arrays["old_logprobs"][i])
        advantage = arrays["advantages"][i]
        bounded = min(max(r, 1 - cliprange), 1 + cliprange)
        surrogate.append(min(r * advantage, bounded * advantage))
        v, old, target = (arrays[n][i] for n in ("values", "old_values", "returns"))
        near = min(max(v, old - cliprange_value), old + cliprange_value)
        value.append(0.5 * max((v - target) ** 2, (near - target) ** 2))
    if not surrogate:
        return 0.0
    entropy, kl = arrays["entropy"][keep].mean(), arrays["kl"][keep].mean()
    return -np.mean(surrogate) + vf_coef * np.mean(value) - ent_coef * entropy + kl_coef * kl


@pytest.mark.parametrize("backend", ALL)
def test_agrees_with_the_paper(backend):
    inputs = make_inputs((3, 41), device_of(backend))
    loss = ppo_loss(**inputs, **COEFS, backend=backend).loss.item()
    assert loss == pytest.approx(oracle(inputs, **COEFS), abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40)),
    spread=st.sampled_from([0.0, 0.1, 3.0, 200.0]),  # 200: ratios that overflow float32
    keep=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_finite_in_finite_out(backend, shape, spread, keep, seed):
    torch.manual_seed(seed)
    inputs = make_inputs(shape, device_of(backend), keep=keep)
    inputs["logprobs"] = inputs["old_logprobs"] + spread * torch.randn_like(inputs["logprobs"])
    out, grads = run(inputs, backend=backend)
    expected, expected_grads = run(to_double(inputs), backend="reference")
    for actual, exact in zip(out + grads, expected + expected_grads, strict=True):
        assert torch.isfinite(actual).all()
        # exp(60 +- one ulp of 60) differs by 4e-6, relative
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)
    for grad in grads:
        assert not grad[~inputs["mask"]].any()


@pytest.mark.parametrize("backend", ALL)
def test_masked_values_do_not_matter(backend):
    inputs = make_inputs((2, 133), device_of(backend))
    clean = run(inputs, torch.ones(5), backend=backend)
    for poison in (torch.nan, torch.inf, -torch.inf):
        dirty = {
            n: t if n == "mask" else torch.where(inputs["mask"], t, poison)
            for n, t in inputs.items()
        }
        out, grads = run(dirty, torch.ones(5), backend=backend)
        for a, b in zip(clean[0] + clean[1], out + grads, strict=True):
            assert torch.equal(a, b), poison


@pytest.mark.parametrize("backend", ALL)
def test_log_ratios_are_cut_at_60(backend):
    """Beyond it there is no gradient, and the statistics are those of the end: by hand."""
    device = device_of(backend)
    for log_ratio, approx_kl in ((-100.0, 59.0), (100.0, math.exp(60.0))):
        logprobs = torch.tensor([[log_ratio]], device=device, requires_grad=True)
        ones = torch.ones(1, 1, device=device)
        out = ppo_loss(
            logprobs,
            None,
            old_logprobs=0 * ones,
            old_values=None,
            advantages=-ones,
            returns=None,
            mask=ones > 0,
            backend=backend,
        )
        assert out.approx_kl.item() == pytest.approx(approx_kl, rel=1e-5)
        assert out.ratio.item() == pytest.approx(math.exp(math.copysign(60.0, log_ratio)), rel=1e-5)
        assert torch.autograd.grad(out.loss, logprobs)[0].item() == 0.0


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_empty(backend, shape):
    out, grads = run(make_inputs(shape, device_of(backend)), backend=backend)
    assert all(t.item() == 0 for t in out)
    assert all(g.shape == shape for g in grads)


@pytest.mark.parametrize("backend", ALL)
def test_nothing_counts(backend):
    out, grads = run(make_inputs((2, 9), device_of(backend), keep=0.0), backend=backend)
    assert all(t.item() == 0 for t in out)
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("backend", ALL)
def test_one_side_only(backend):
    """A critic-only step leaves the policy's terms at 0, and the other way round."""
    inputs = make_inputs((3, 50), device_of(backend))
    both = ppo_loss(**inputs, backend=backend)
    without = {"logprobs": None, "old_logprobs": None, "advantages": None}
    critic = ppo_loss(**{**inputs, **without}, backend=backend)
    assert [critic.policy_loss, critic.approx_kl, critic.clipfrac, critic.ratio] == [0, 0, 0, 0]
    assert critic.value_loss == both.value_loss and critic.vf_clipfrac == both.vf_clipfrac
    without = {"values": None, "old_values": None, "returns": None}
    actor = ppo_loss(**{**inputs, **without}, backend=backend)
    assert actor.value_loss == 0 and actor.vf_clipfrac == 0
    assert actor.policy_loss == both.policy_loss and actor.ratio == both.ratio
    # what goes with the absent side is not looked at, whatever it is
    unread = {"logprobs": None, "advantages": torch.zeros(1), "old_logprobs": inputs["mask"]}
    assert ppo_loss(**{**inputs, **unread}, backend=backend) == critic
    unread = {"values": None, "returns": torch.zeros(1), "old_values": inputs["mask"]}
    assert ppo_loss(**{**inputs, **unread}, backend=backend) == actor


@pytest.mark.parametrize("backend", ALL)
def test_neither_side(backend):
    """The means of entropy and divergence alone, which have no side."""
    inputs = make_inputs((3, 50), device_of(backend))
    given = {n: inputs[n] if n in ("entropy", "kl", "mask") else None for n in inputs}
    out = ppo_loss(**given, **COEFS, backend=backend)
    entropy, kl = (inputs[n][inputs["mask"]].double().mean().item() for n in ("entropy", "kl"))
    assert out.loss.item() == pytest.approx(0.05 * kl - 0.01 * entropy, abs=1e-7)
    assert not any(t.item() for name, t in out._asdict().items() if name not in given | {"loss": 1})


@pytest.mark.parametrize("backend", ALL)
def test_without_gradients_and_defaults(backend):
    inputs = make_inputs((3, 50), device_of(backend))
    expected, _ = run(inputs, backend=backend)
    with torch.no_grad():
        for a, b in zip(ppo_loss(**inputs, **COEFS, backend=backend), expected, strict=True):
            assert torch.equal(a, b)
    spelt = dict(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, ent_coef=0.0, kl_coef=0.0)
    assert ppo_loss(**inputs, backend=backend) == ppo_loss(**inputs, **spelt, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_and_half(backend, dtype):
    inputs = make_inputs((64, 33), device_of(backend))
    turned = {n: t.t().contiguous().t() for n, t in inputs.items()}
    assert not turned["logprobs"].is_contiguous()
    expected = run(inputs, backend=backend)
    for names in (list(inputs), ["advantages"], ["mask"]):
        found = run(inputs | {n: turned[n] for n in names}, backend=backend)
        for a, b in zip(expected, found, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    half = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    leaf = half["logprobs"].requires_grad_()
    out = ppo_loss(**half, backend=backend)
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and leaf.grad.dtype == dtype
    widened = {n: t.float() if t.is_floating_point() else t for n, t in half.items()}
    assert out.loss == ppo_loss(**widened, backend=backend).loss


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit(backend):
    inputs = make_inputs((5, 1500), device_of(backend))
    first = run(inputs, backend=backend)
    again = run(inputs, backend=backend)
    for a, b in zip(first[0] + first[1], again[0] + again[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="HYDRA_BUILD=none builds no C++ kernels")
def test_means_of_a_million_tokens_keep_their_digits():
    """Of equal terms: what rounding takes from a float32 sum of the blocks, it takes each time:
    1.2e-5 in all, where sums within blocks alone lose 6e-7."""
    x = torch.full((64, 16384), 0.3)
    inputs = dict.fromkeys(("old_logprobs", "old_values", "advantages", "values"), x)
    inputs |= dict(logprobs=x + 0.1, returns=torch.zeros_like(x), mask=torch.ones_like(x).bool())
    out = ppo_loss(**inputs, backend="cpu")
    few = {
        n: t[:1, :100].double() if t.is_floating_point() else t[:1, :100] for n, t in inputs.items()
    }
    exact = ppo_loss(**few, backend="reference")
    for name in ("loss", "policy_loss", "value_loss", "ratio"):  # approx_kl cancels by itself
        got = getattr(out, name).double()
        torch.testing.assert_close(got, getattr(exact, name), rtol=4e-6, atol=0.0)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built (HYDRA_BUILD=none)")
def test_threads_do_not_change_the_result():
    inputs = make_inputs((40, 1024), "cpu")  # enough tokens to run in parallel
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(inputs, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for out, grads in results[1:]:
        for a, b in zip(results[0][0] + results[0][1], out + grads, strict=True):
            assert torch.equal(a, b)


def test_gradcheck_reference():
    # keep away from the kinks: the ratio in one of three ranges, values within or far outside
    torch.manual_seed(1)
    inputs = make_inputs((2, 6), "cpu", dtype=torch.float64)
    leaves = [inputs[n].requires_grad_() for n in DIFFERENTIABLE]

    def losses(logprobs, values, entropy, kl):
        out = reference.ppo_loss(
            logprobs,
            values,
            *(inputs[n] for n in ("old_logprobs", "old_values", "advantages", "returns", "mask")),
            0.2,
            0.3,
            0.5,
            entropy,
            0.01,
            kl,
            0.05,
        )
        return out[:5]

    assert torch.autograd.gradcheck(losses, leaves)


def test_rounding_does_not_clip_a_value_that_did_not_move_far():
    """old + (v - old) is not v in float32; the clipped branch must not win by that rounding."""
    values = torch.rand(1, 4096) * 1e-3 + 7.0
    old_values = values + 0.1 * torch.rand(1, 4096)
    zeros, mask = torch.zeros(1, 4096), torch.ones(1, 4096, dtype=torch.bool)
    for backend in ALL:
        device = device_of(backend)
        out = ppo_loss(
            None,
            values.to(device),
            old_logprobs=None,
            old_values=old_values.to(device),
            advantages=None,
            returns=zeros.to(device),
            mask=mask.to(device),
            backend=backend,
        )
        assert out.vf_clipfrac.item() == 0.0, backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    inputs = make_inputs((2, 17), device_of(backend))
    names = ("old_logprobs", "old_values", "advantages", "returns", "entropy", "kl", "mask")
    rest = [inputs[n] for n in names]
    for n in (4, 5):  # entropy, kl
        rest[n].requires_grad_()
    args = (inputs["logprobs"].requires_grad_(), inputs["values"].requires_grad_(), *rest)
    torch.library.opcheck(torch.ops.hydra.ppo_loss_fwd, (*args, 0.2, 0.3, 0.5, 0.01, 0.05, backend))


def test_compiles():
    """fullgraph, as eager to the bit, and new inputs of the same shape do not recompile."""
    backend = BACKENDS[0] if BACKENDS else "reference"
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(logprobs, values, rest):
        return ppo_loss(logprobs, values, **rest, **COEFS)

    for _ in range(2):
        inputs = make_inputs((2, 33), device_of(backend))
        eager = run(inputs)
        leaves = {n: inputs[n].clone().requires_grad_() for n in DIFFERENTIABLE}
        rest = {n: t for n, t in {**inputs, **leaves}.items() if n not in ("logprobs", "values")}
        out = step(leaves["logprobs"], leaves["values"], rest)
        grads = torch.autograd.grad(out.loss, list(leaves.values()))
        for a, b in zip([*out, *grads], eager[0] + eager[1], strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


def refusals():
    inputs = make_inputs((2, 3), "cpu")
    wrong_shape = {**inputs, "values": torch.zeros(2, 4)}
    yield wrong_shape, {}, ValueError, r"shapes differ: values is \(2, 4\), mask is \(2, 3\)"
    yield {**inputs, "mask": inputs["mask"].int()}, {}, ValueError, "mask must be bool"
    yield {**inputs, "returns": None}, {}, ValueError, "values needs returns, got None"
    yield {**inputs, "old_logprobs": None}, {}, ValueError, "logprobs needs old_logprobs"
    yield {**inputs, "advantages": None}, {}, ValueError, "logprobs needs advantages, got None"
    yield {**inputs, "old_values": None}, {}, ValueError, "values needs old_values, got None"
    yield inputs, {"cliprange_value": 0.0}, ValueError, "cliprange_value must be > 0, got 0.0"
    yield {**inputs, "kl": inputs["mask"]}, {}, ValueError, "kl must be floating point"
    yield {**inputs, "kl": inputs["kl"].to("meta")}, {}, ValueError, "devices differ: kl is on meta"
    yield inputs, {"cliprange": 0.0}, ValueError, "cliprange must be in"
    yield inputs, {"cliprange": 1.0}, ValueError, "cliprange must be in"
    yield inputs, {"cliprange_value": -1.0}, ValueError, "cliprange_value must be > 0"
    yield inputs, {"backend": "tpu"}, NotImplementedError, "no such backend .known: cuda, cpu"
    if "cpu" in BACKENDS:
        doubles = to_double(inputs)
        yield doubles, {"backend": "cpu"}, NotImplementedError, "cpu.*cannot run.*needs torch.float"


@pytest.mark.parametrize("inputs, kwargs, error, message", list(refusals()))
def test_refuses(inputs, kwargs, error, message):
    with pytest.raises(error, match=message):
        ppo_loss(**inputs, **kwargs)


def test_backends_agree_on_which_gradients_exist():
    """No gradient is made for what did not ask, and the statistics never ask."""
    inputs = make_inputs((2, 9), "cpu")
    for backend, name in itertools.product([b for b in ALL if b != "cuda"], DIFFERENTIABLE):
        leaf = inputs[name].clone().requires_grad_()
        out = ppo_loss(**{**inputs, name: leaf}, **COEFS, backend=backend)
        out.loss.backward()
        assert leaf.grad is not None and leaf.grad.any()
        for statistic in ("approx_kl", "clipfrac", "vf_clipfrac", "ratio"):
            assert not getattr(out, statistic).requires_grad, (backend, statistic)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["logprobs", "values", "mask"])
def test_a_class_that_kernels_cannot_read_runs_the_reference(backend, name):
    class Watched(torch.Tensor):
        seen = 0

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            Watched.seen += 1
            plain = [a.plain if isinstance(a, Watched) else a for a in args]
            return func(*plain, **(kwargs or {}))

    inputs = make_inputs((2, 9), device_of(backend))
    expected = ppo_loss(**inputs, backend="reference")
    watched = torch.Tensor._make_wrapper_subclass(
        Watched, (2, 9), dtype=inputs[name].dtype, device=inputs[name].device
    )
    watched.plain = inputs[name]
    inputs[name] = watched
    for got, want in zip(ppo_loss(**inputs), expected, strict=True):
        assert torch.equal(got, want)
    assert Watched.seen
    with pytest.raises(NotImplementedError, match="kernels take no .*Watched"):
        ppo_loss(**inputs, backend=backend)


def test_one_float64_makes_every_statistic_float64():
    inputs = make_inputs((2, 9), "cpu")
    for name in (*DIFFERENTIABLE, "returns"):
        out = ppo_loss(**{**inputs, name: inputs[name].double()}, **COEFS)
        assert {t.dtype for t in out} == {torch.float64}, name

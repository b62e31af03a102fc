"""linear_logprob against its definition in float64, and what must not matter to it.

Past 500 lines: one list of inputs, outputs and upstream gradients serves every test here.
"""

import math

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hydra_kernels import LinearLogprob, available_backends, linear_logprob
from hydra_kernels.backends.cpu import linear_logprob as cpu
from tests.numerics import assert_no_worse_than_torch, device_of, fast_backends

OP = "linear_logprob"
BACKENDS = fast_backends(OP)
ALL = list(available_backends(OP))
# On a CPU Triton's kernels are interpreted, a thousand times slower.
INTERPRETED = ["triton"] if "triton" in BACKENDS and not torch.cuda.is_available() else []
COMPILED = [name for name in BACKENDS if name not in INTERPRETED]
ATOL = 1e-6  # float32 ulps of logits around 8, once in z and once in the log-sum-exp
DIFFERENTIABLE = ("logprobs", "entropy", "logsumexp", "kl")


def make_inputs(M, D, V, device="cpu", dtype=torch.float32, ignored=0.2, bias=True):
    weight = 3.0 * torch.randn(V, D) / math.sqrt(D)  # logits around 3: p spans five decades
    hidden = torch.randn(M, D)
    targets = torch.randint(V, (M,))
    targets[torch.rand(M) < ignored] = -100
    inputs = {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "bias": torch.randn(V) if bias else None,
        "ref_hidden": hidden + 0.3 * torch.randn(M, D),  # KL around 0.4
    }
    return {
        name: t if t is None else t.to(device, dtype if t.is_floating_point() else t.dtype)
        for name, t in inputs.items()
    }


def to_double(inputs):
    return {
        name: t.double() if t is not None and t.is_floating_point() else t
        for name, t in inputs.items()
    }


def run(inputs, upstream=None, outputs=DIFFERENTIABLE, leaves=("hidden", "weight", "bias"), **kw):
    """Every result, and the gradients under ``upstream`` (4, M) of the outputs named."""
    given = dict(inputs)
    for name in leaves:
        if given[name] is not None:
            given[name] = given[name].detach().clone().requires_grad_()
    wanted = [given[name] for name in leaves if given[name] is not None]
    out = linear_logprob(
        given.pop("hidden"), given.pop("weight"), given.pop("targets"), **given, **kw
    )
    results = {n: t.detach() for n, t in out._asdict().items() if t is not None}
    if upstream is None:
        return results
    terms = [
        (getattr(out, name) * g.to(getattr(out, name))).sum()
        for name, g in zip(DIFFERENTIABLE, upstream, strict=True)
        if name in outputs and getattr(out, name) is not None
    ]
    return results, list(torch.autograd.grad(sum(terms), wanted))


def assert_as_reference(inputs, upstream, backend, **kw):
    actual = run(inputs, upstream, backend=backend, **kw)
    kw.pop("memory", None)
    same = run(inputs, upstream, backend="reference", **kw)
    exact = run(to_double(inputs), upstream.double(), backend="reference", **kw)
    for name in exact[0]:
        # The reference of half precision works from logits rounded to it.
        assert_no_worse_than_torch(actual[0][name], same[0][name], exact[0][name], atol=ATOL)
    for a, s, e in zip(actual[1], same[1], exact[1], strict=True):
        assert_no_worse_than_torch(a, s, e, atol=ATOL)


@pytest.mark.parametrize("backend", ALL)
def test_by_hand(backend):
    """z = (0, log 3): p = (1/4, 3/4); the reference's z = 0: q = (1/2, 1/2)."""
    device = device_of(backend)
    hidden = torch.ones(1, 1, device=device, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3.0)]], device=device)
    out = linear_logprob(
        hidden,
        weight,
        torch.tensor([1], device=device),
        ref_hidden=torch.zeros(1, 1, device=device),
        backend=backend,
    )
    assert isinstance(out, LinearLogprob)
    entropy = 0.25 * math.log(4.0) + 0.75 * math.log(4.0 / 3.0)
    expected = (math.log(0.75), entropy, math.log(4.0), -math.log(2.0), math.log(2.0) - entropy)
    for actual, by_hand in zip(out, expected, strict=True):
        torch.testing.assert_close(actual.cpu(), torch.tensor([by_hand]))
    # d logprob / d z_1 = 1 - p_1 = 1/4, and z_1 = hidden log 3; the KL's is p_0 p_1 (log 3)^2
    grads = torch.autograd.grad(out.logprobs, hidden, retain_graph=True)
    torch.testing.assert_close(grads[0].cpu(), torch.tensor([[0.25 * math.log(3.0)]]))
    grads = torch.autograd.grad(out.kl, hidden)
    torch.testing.assert_close(grads[0].cpu(), torch.tensor([[3 / 16 * math.log(3.0) ** 2]]))


# one element; less than a vector; odd everywhere; two tiles of rows and two blocks of vocabulary
SHAPES = [(1, 1, 1), (3, 5, 7), (19, 33, 331), (1100, 24, 2311)]
VARIANTS = {
    "plain": dict(bias=False),
    "bias": dict(temperature=1.0),
    "temperature": dict(bias=False, temperature=0.7),
    "softcap": dict(softcap=2.0, temperature=1.3),  # half of the logits are beyond the knee
}


def cases():
    for backend in BACKENDS:
        for shape in SHAPES:
            for variant in VARIANTS:
                if backend in INTERPRETED:
                    if variant != "plain" and shape != SHAPES[2]:
                        continue
                    # still three blocks of rows
                    shape = tuple(map(min, shape, (70, 33, 331)))
                label = "-".join(f"{n}{size}" for n, size in zip("MDV", shape, strict=True))
                yield pytest.param(backend, shape, variant, id=f"{backend}-{label}-{variant}")


@pytest.mark.parametrize("backend, shape, variant", list(cases()))
def test_matches_reference(backend, shape, variant):
    kw = dict(VARIANTS[variant])
    inputs = make_inputs(*shape, device_of(backend), bias=kw.pop("bias", True))
    upstream = torch.randn(4, shape[0], device=device_of(backend))
    assert_as_reference(inputs, upstream, backend, **kw)


@pytest.mark.parametrize("V", [129920, 151936, 50257, 10007, 1])
@pytest.mark.parametrize("backend", COMPILED)
def test_vocabularies(backend, V):
    device = device_of(backend)
    inputs = make_inputs(5, 16, V, device, ignored=0.0)
    inputs["targets"][0], inputs["targets"][1] = 0, V - 1
    assert_as_reference(inputs, torch.randn(4, 5, device=device), backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend, dtype):
    """The results are float32, and as near to float64 as float32 sums of such inputs are."""
    if backend in INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has wrong bfloat16 products; needs an NVIDIA GPU")
    device = device_of(backend)
    inputs = make_inputs(37, 48, 523, device, dtype)
    upstream = torch.randn(4, 37, device=device)
    results, grads = run(inputs, upstream, backend=backend, temperature=0.9)
    exact, exact_grads = run(
        to_double(inputs), upstream.double(), backend="reference", temperature=0.9
    )
    for name, t in results.items():
        assert t.dtype == torch.float32
        torch.testing.assert_close(t.double(), exact[name], rtol=1e-5, atol=1e-5)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        error = (grad.double() - exact_grad).norm() / exact_grad.norm()
        # dz and the result are rounded to dtype on a GPU
        assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("outputs", [(n,) for n in DIFFERENTIABLE] + [("entropy", "kl")], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_subset_of_upstreams(backend, outputs):
    device = device_of(backend)
    inputs = make_inputs(21, 16, 133, device)
    upstream = torch.randn(4, 21, device=device)
    assert_as_reference(inputs, upstream, backend, outputs=outputs)


@pytest.mark.parametrize(
    "leaves", [("hidden",), ("weight",), ("bias",), ("bias", "hidden")], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend, leaves):
    device = device_of(backend)
    inputs = make_inputs(9, 16, 40, device)
    upstream = torch.randn(4, 9, device=device)
    everything = run(inputs, upstream, backend=backend)[1]
    some = run(inputs, upstream, backend=backend, leaves=leaves)[1]
    for name, grad in zip(leaves, some, strict=True):
        assert torch.equal(grad, everything[("hidden", "weight", "bias").index(name)])


@pytest.mark.parametrize("backend", ALL)
def test_logits_shifted_far(backend):
    """All logits about -1e4: a shift of all of them changes the log-sum-exp and nothing else."""
    device = device_of(backend)
    inputs = make_inputs(6, 8, 90, device)
    # multiples of 2^-9: what float32 can add to 1e4 without rounding
    inputs |= {n: (inputs[n] * 512).round() / 512 for n in ("bias",)}
    inputs |= {n: (inputs[n] * 16).round() / 16 for n in ("hidden", "weight", "ref_hidden")}
    upstream = torch.randn(4, 6, device=device)
    near, near_grads = run(inputs, upstream, backend=backend)
    inputs["bias"] = inputs["bias"] - 1e4
    far, far_grads = run(inputs, upstream, backend=backend)
    keep = inputs["targets"] != -100
    near["logsumexp"] = torch.where(keep, near["logsumexp"] - 1e4, 0)
    for name in near:
        # logsumexp: one ulp of 1e4
        torch.testing.assert_close(far[name], near[name], rtol=1e-6, atol=1e-5)
    for a, b in zip(far_grads, near_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", COMPILED)
def test_every_token_is_a_target_once(backend):
    """So are those at both ends of each block of the vocabulary, whatever its size."""
    V = 1100
    inputs = make_inputs(V, 16, V, device_of(backend), ignored=0.0)
    inputs["targets"] = torch.arange(V, device=device_of(backend))
    for bias in (inputs["bias"], None):
        assert_as_reference({**inputs, "bias": bias}, torch.randn(4, V), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_far_beyond_the_softcap(backend):
    inputs = make_inputs(8, 16, 70, device_of(backend))
    inputs |= {n: 100 * inputs[n] for n in ("hidden", "ref_hidden")}  # up to 500 times the cap
    assert_as_reference(inputs, torch.randn(4, 8), backend, softcap=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearly_equal_policies(backend):
    """A divergence of 1e-12 is a difference of numbers near 10; it is never below 0."""
    inputs = make_inputs(60, 16, 70, device_of(backend), ignored=0.0)
    inputs["ref_hidden"] = inputs["hidden"] * (1 + 1e-6)
    kl = run(inputs, backend=backend)["kl"]
    assert (kl >= 0).all() and kl.max() < 1e-5


@pytest.mark.parametrize("at, V", [(3, 70), (1098, 1100)])  # in the last block of two
@pytest.mark.parametrize("backend", ALL)
def test_one_logit_above_all(backend, at, V):
    device = device_of(backend)
    inputs = make_inputs(4, 8, V, device, ignored=0.0)
    inputs["bias"][at] = 1e4
    inputs["targets"] = torch.tensor([at, at, 0, 69], device=device)
    out, grads = run(inputs, torch.ones(4, 4, device=device), backend=backend)
    assert out["logprobs"][:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(
        out["logprobs"][2:].cpu(), torch.tensor([-1e4, -1e4]), rtol=0, atol=40
    )
    assert not out["entropy"].any() and not out["kl"].any()
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("backend", ALL)
def test_ignored_rows_may_hold_anything(backend):
    device = device_of(backend)
    inputs = make_inputs(13, 16, 50, device)
    inputs["targets"][:3] = -100
    upstream = torch.randn(4, 13, device=device)
    keep = (inputs["targets"] != -100).unsqueeze(-1)
    clean = run(inputs, upstream, backend=backend)
    assert not any(t[~keep.squeeze(-1)].any() for t in clean[0].values())
    for poison in (torch.nan, torch.inf):
        dirty = dict(inputs)
        for name in ("hidden", "ref_hidden"):
            dirty[name] = torch.where(keep, inputs[name], poison)
        out, grads = run(dirty, upstream, backend=backend)
        for name in out:
            assert torch.equal(out[name], clean[0][name])
        for a, b in zip(grads, clean[1], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ALL)
def test_every_row_ignored_or_none_there(backend):
    device = device_of(backend)
    for M, ignored in ((7, 1.0), (0, 0.0)):
        inputs = make_inputs(M, 16, 40, device, ignored=ignored)
        out, grads = run(inputs, torch.ones(4, M, device=device), backend=backend)
        assert all(t.shape == (M,) and not t.any() for t in out.values())
        assert all(
            g.shape == inputs[n].shape and not g.any()
            for n, g in zip(("hidden", "weight", "bias"), grads, strict=True)
        )


@pytest.mark.parametrize("backend", ALL)
def test_equal_policies(backend):
    """KL exactly 0, and no gradient from it, in the rows whose reference is the same."""
    device = device_of(backend)
    inputs = make_inputs(20, 24, 101, device, ignored=0.0)
    inputs["ref_hidden"][::2] = inputs["hidden"][::2]
    inputs["bias"] = None
    for kw in ({}, {"temperature": 0.3, "softcap": 3.0}):
        out, grads = run(
            inputs,
            torch.randn(4, 20, device=device),
            outputs=("kl",),
            leaves=("hidden",),
            backend=backend,
            **kw,
        )
        assert not out["kl"][::2].any() and not grads[0][::2].any()
        assert out["kl"][1::2].min() > 0 and grads[0][1::2].abs().amax(-1).min() > 0
        assert torch.equal(out["ref_logprobs"][::2], out["logprobs"][::2])


@pytest.mark.parametrize("backend", COMPILED)
@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 80), st.integers(1, 40), st.integers(1, 300)),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    seed=st.integers(0, 2**20),
)
def test_bounds(backend, shape, scale, seed):
    """logprobs <= 0 <= KL, 0 <= entropy <= log V, all finite, whatever the spread of the logits."""
    torch.manual_seed(seed)
    inputs = make_inputs(*shape, device_of(backend))
    inputs["hidden"] = inputs["hidden"] * scale
    out, grads = run(inputs, torch.randn(4, shape[0]).to(device_of(backend)), backend=backend)
    assert (out["logprobs"] <= 0).all() and (out["ref_logprobs"] <= 0).all()
    assert (out["kl"] >= 0).all() and (out["entropy"] >= 0).all()
    assert (out["entropy"] <= math.log(shape[2]) + 1e-5).all()
    assert all(torch.isfinite(t).all() for t in [*out.values(), *grads])


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_strides_do_not_matter(backend):
    device = device_of(backend)
    # none ignored: nothing else makes the targets dense
    inputs = make_inputs(24, 16, 70, device, ignored=0.0)
    flat = run(inputs, torch.ones(4, 24, device=device), backend=backend)
    deep = {
        n: inputs[n].reshape(2, 3, 4, *inputs[n].shape[1:])
        for n in ("hidden", "targets", "ref_hidden")
    }
    out, grads = run({**inputs, **deep}, torch.ones(4, 2, 3, 4, device=device), backend=backend)
    for name in flat[0]:
        assert out[name].shape == (2, 3, 4)
        assert torch.equal(out[name].flatten(), flat[0][name])
    assert grads[0].shape == (2, 3, 4, 16)
    assert torch.equal(grads[0].flatten(0, 2), flat[1][0]) and torch.equal(grads[1], flat[1][1])

    def strided(t):  # every other column of a wider tensor
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype, device=device)
        wide[..., ::2] = t
        return wide[..., ::2]

    apart = {n: strided(inputs[n]) for n in ("hidden", "weight", "ref_hidden", "bias")}
    targets = inputs["targets"].repeat_interleave(2)[::2]
    assert not targets.is_contiguous()
    out = linear_logprob(
        apart.pop("hidden"), apart.pop("weight"), targets, **apart, backend=backend
    )
    for name in flat[0]:
        torch.testing.assert_close(getattr(out, name), flat[0][name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "backend, M, D, V",
    [(b, 1100, *size) for b in COMPILED for size in ((16, 70), (100, 2500), (512, 33), (7, 3))]
    + [(b, 80, 48, 70) for b in INTERPRETED],
)
def test_a_row_does_not_depend_on_its_batch(backend, M, D, V, dtype=torch.float32):
    """Bit for bit: alone, in the middle of others, among 1100 (more than one tile)."""
    device = device_of(backend)
    inputs = make_inputs(M, D, V, device, dtype, ignored=0.1)
    upstream = torch.randn(4, M, device=device)
    out, (dhidden, _) = run(inputs, upstream, leaves=("hidden", "weight"), backend=backend)
    for rows in (slice(5, 6), slice(17, 58), slice(M - 3, M), slice(0, M, 7)):
        part = {n: inputs[n][rows] for n in ("hidden", "targets", "ref_hidden")}
        few, (grad,) = run(
            {**inputs, **part}, upstream[:, rows], leaves=("hidden",), backend=backend
        )
        for name in out:
            assert torch.equal(few[name], out[name][rows]), (name, rows)
        assert torch.equal(grad, dhidden[rows]), rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", COMPILED)
def test_a_row_does_not_depend_on_its_batch_in_half_precision(backend, dtype):
    test_a_row_does_not_depend_on_its_batch(backend, 600, 37, 1100, dtype)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built (HYDRA_BUILD=none)")
@pytest.mark.parametrize("V", [257, 1])
def test_a_row_does_not_depend_on_its_batch_with_threads(V):
    """MKL on two threads rounds 64 rows by 257 columns at this depth unlike 1024 rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        test_a_row_does_not_depend_on_its_batch("cpu", 1100, 1024, V)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit(backend):
    M = 300 if backend in COMPILED else 40
    inputs = make_inputs(M, 48, 211, device_of(backend))
    upstream = torch.randn(4, M, device=device_of(backend))
    first, again = (run(inputs, upstream, backend=backend) for _ in range(2))
    for name in first[0]:
        assert torch.equal(first[0][name], again[0][name])
    for a, b in zip(first[1], again[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_logits(backend, dtype):
    """As recomputed in float32; in half precision as if the logits had been rounded to it."""
    device = device_of(backend)
    inputs = make_inputs(70, 32, 150, device, dtype)
    upstream = torch.randn(4, 70, device=device)
    saved, saved_grads = run(inputs, upstream, backend=backend, memory="save", softcap=4.0)
    made, made_grads = run(inputs, upstream, backend=backend, softcap=4.0)
    # a logit of 8 rounds by 2^-9 in float16
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    for name in made:
        torch.testing.assert_close(saved[name], made[name], rtol=tolerance, atol=tolerance)
    for a, b in zip(saved_grads, made_grads, strict=True):
        assert (a.double() - b.double()).norm() < tolerance * 3 * b.double().norm()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in INTERPRETED])
def test_logits_are_saved_where_asked_and_for_a_backward_alone(backend):
    inputs = make_inputs(70, 16, 150, device_of(backend), torch.bfloat16)
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"]
    sizes = {}
    for memory in ("recompute", "save"):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, id):
            linear_logprob(hidden, weight, inputs["targets"], memory=memory, backend=backend)
        sizes[memory] = max(t.numel() for t in saved)
    assert sizes == {"recompute": weight.numel(), "save": 70 * 150}
    with torch.no_grad():  # not even rounded to the dtype in which they would have been kept
        made, kept = (run(inputs, leaves=(), backend=backend, memory=m) for m in sizes)
    for name in made:
        assert torch.equal(made[name], kept[name])


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("backend", COMPILED)
def test_never_holds_the_logits(backend, monkeypatch):
    device = device_of(backend)
    inputs = make_inputs(1500, 16, 9000, device)
    upstream = torch.randn(4, 1500, device=device)
    run(inputs, upstream, backend=backend)  # what is found out once a shape is not counted

    def largest(budget):
        monkeypatch.setenv("HYDRA_LOGPROB_BUDGET_MB", budget)
        with Largest() as seen:
            out, grads = run(inputs, upstream, backend=backend)
        return seen.numel, out, grads

    usual, out, grads = largest("64")
    # A GPU's cache holds all of logits this small.
    assert usual < 1500 * 9000 / 4 or device == "cuda"
    small, small_out, small_grads = largest("2")
    assert small * 4 <= 2 * 2**20
    for name in out:
        torch.testing.assert_close(small_out[name], out[name], rtol=1e-5, atol=1e-5)
    for a, b in zip(small_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
def test_chunks_go_on_where_the_last_one_stopped(backend, monkeypatch):
    """In Triton the sum over the vocabulary is one chain, whatever the budget cuts it into."""
    device = device_of(backend)
    inputs = make_inputs(40, 24, 211, device)
    upstream = torch.randn(4, 40, device=device)
    _, whole = run(inputs, upstream, backend=backend)
    monkeypatch.setenv("HYDRA_LOGPROB_BUDGET_MB", "0.02")  # 128 columns of 40 rows
    _, cut = run(inputs, upstream, backend=backend)
    for a, b in zip(whole, cut, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape, dtype", [((1,), torch.float32), ((1, 1, 1), torch.float64)])
@pytest.mark.parametrize("backend", ALL)
def test_temperature_as_a_tensor(backend, shape, dtype):
    device = device_of(backend)
    inputs = make_inputs(9, 16, 40, device)
    upstream = torch.randn(4, 9, device=device)
    temperature = torch.full(shape, 0.75, dtype=dtype, device=device)
    number = run(inputs, upstream, backend=backend, temperature=0.75)
    tensor = run(inputs, upstream, backend=backend, temperature=temperature)
    for name in number[0]:
        assert torch.equal(number[0][name], tensor[0][name])
    assert torch.equal(number[1][0], tensor[1][0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_of_any_integers(backend, dtype):
    inputs = make_inputs(9, 16, 40, device_of(backend), ignored=0.0)
    expected = run(inputs, backend=backend)
    inputs["targets"] = inputs["targets"].to(dtype)
    for name, t in run(inputs, backend=backend).items():
        assert torch.equal(t, expected[name]), name


@pytest.mark.parametrize("ignore_index", [-1, 7])  # no token; a token, of padding say
@pytest.mark.parametrize("backend", ALL)
def test_another_ignore_index(backend, ignore_index):
    inputs = make_inputs(9, 16, 40, device_of(backend))
    inputs["targets"] = torch.where(inputs["targets"] == 7, -100, inputs["targets"])
    upstream = torch.randn(4, 9, device=device_of(backend))
    expected = run(inputs, upstream, backend=backend)
    keep = inputs["targets"] != -100
    inputs["targets"] = torch.where(keep, inputs["targets"], ignore_index)
    out, grads = run(inputs, upstream, backend=backend, ignore_index=ignore_index)
    for name, t in out.items():
        assert torch.equal(t, expected[0][name]) and not t[~keep].any(), name
    for a, b in zip(grads, expected[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ALL)
def test_constants_that_ask_for_a_gradient_get_none(backend):
    inputs = make_inputs(5, 16, 40, device_of(backend))
    temperature = torch.ones((), device=device_of(backend), requires_grad=True)
    inputs["ref_hidden"].requires_grad_()
    out = linear_logprob(**inputs, temperature=temperature, backend=backend)
    assert not any(t.requires_grad for t in out)
    inputs["hidden"].requires_grad_()
    out = linear_logprob(**inputs, temperature=temperature, backend=backend)
    assert all(getattr(out, name).requires_grad for name in DIFFERENTIABLE)
    assert not out.ref_logprobs.requires_grad
    sum(getattr(out, name).sum() for name in DIFFERENTIABLE).backward()
    assert inputs["ref_hidden"].grad is None and temperature.grad is None


@pytest.mark.parametrize("backend", ALL)
def test_a_reference_without_upstream_is_not_read_in_backward(backend):
    """One that has gone to NaN leaves the gradient of the log-probabilities as it is."""
    inputs = make_inputs(9, 16, 40, device_of(backend))
    upstream = torch.randn(4, 9, device=device_of(backend))
    alone = run({**inputs, "ref_hidden": None}, upstream, ("logprobs", "entropy"), backend=backend)
    inputs["ref_hidden"] = inputs["ref_hidden"] * torch.nan
    _, grads = run(inputs, upstream, ("logprobs", "entropy"), backend=backend)
    for a, b in zip(grads, alone[1], strict=True):
        torch.testing.assert_close(a, b)


def refusals():
    inputs = make_inputs(3, 4, 5, bias=True, ignored=0.0)
    hidden, weight, targets = inputs["hidden"], inputs["weight"], inputs["targets"]
    value = ValueError
    yield {"weight": weight[0]}, value, r"weight must be \(V, D\), neither 0, got \(4,\)"
    yield {"hidden": hidden[:, :3]}, value, r"hidden must end in D = 4.* got \(3, 3\)"
    yield {"targets": targets[:2]}, value, r"targets must be \(3,\).* got \(2,\)"
    yield {"targets": targets.float()}, value, "targets must be integers, got torch.float32"
    yield {"weight": weight[:0]}, value, r"weight must be \(V, D\), neither 0, got \(0, 4\)"
    yield {"hidden": hidden[0, 0]}, value, r"hidden must end in D = 4.* got \(\)"
    yield {"targets": targets > 0}, value, "targets must be integers, got torch.bool"
    yield {"targets": targets.to(torch.complex64)}, value, "must be integers, got torch.complex64"
    yield {"targets": targets.to("meta")}, value, "several devices: cpu, meta"
    yield {"targets": targets * 0 + 5}, value, r"targets must be in \[0, 5\) or -100, got 5"
    whole = {n: inputs[n].int() for n in ("hidden", "weight", "bias", "ref_hidden")}
    yield whole, value, "one floating-point dtype, got hidden torch.int32"
    far = torch.ones((), device="meta")
    yield {"temperature": far}, value, "several devices: cpu, meta"
    yield {"temperature": torch.ones(1, dtype=torch.int64)}, value, r"got \(1,\) torch.int64"
    yield {"softcap": 0.0}, value, "softcap must be above 0 or None, got 0.0"
    yield {"targets": targets + 5}, value, r"targets must be in \[0, 5\) or -100, got"
    yield {"targets": targets * 0 - 1}, value, r"targets must be in \[0, 5\) or -100, got -1"
    yield {"bias": weight[0]}, value, r"bias must be \(5,\), got \(4,\)"
    yield {"ref_hidden": hidden[:2]}, value, r"ref_hidden must have hidden's shape \(3, 4\), got"
    yield {"hidden": hidden.half()}, value, "one floating-point dtype, got hidden torch.float16"
    yield {"weight": weight.to("meta")}, value, "several devices: cpu, meta"
    yield {"temperature": 0.0}, value, "temperature must be above 0, got 0.0"
    yield {"temperature": float("nan")}, value, "temperature must be above 0, got nan"
    yield {"temperature": torch.ones(2)}, value, r"one floating-point element, got \(2,\)"
    yield {"softcap": -1.0}, value, "softcap must be above 0 or None, got -1.0"
    yield {"memory": "keep"}, value, "memory must be 'recompute' or 'save', got 'keep'"
    yield {"backend": "tpu"}, NotImplementedError, "no such backend"
    if "cpu" in BACKENDS:
        wide = {n: inputs[n].double() for n in ("hidden", "weight", "bias", "ref_hidden")}
        yield {**wide, "backend": "cpu"}, NotImplementedError, "'cpu' cannot run .*torch.float64"


@pytest.mark.parametrize("change, error, message", list(refusals()), ids=lambda x: None)
def test_refuses(change, error, message):
    inputs = {**make_inputs(3, 4, 5, ignored=0.0), **change}
    with pytest.raises(error, match=message):
        linear_logprob(inputs.pop("hidden"), inputs.pop("weight"), inputs.pop("targets"), **inputs)


def test_float64_runs_on_the_reference():
    inputs = to_double(make_inputs(3, 4, 5))
    out = run(inputs)
    assert all(t.dtype == torch.float64 for t in out.values())


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("reference_moves", [True, False])
def test_gradcheck_of_the_reference(softcap, reference_moves):
    """The reference policy is a constant, which finite differences in the head know only where its
    logits do not depend on it: at ref_hidden = 0."""
    hidden, ref_hidden = torch.randn(2, 4, 3, dtype=torch.float64)
    weight, bias = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    targets = torch.tensor([0, 6, -100, 3])

    def run(hidden, weight, bias):
        out = linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias if reference_moves else None,
            temperature=0.7,
            softcap=softcap,
            ref_hidden=ref_hidden if reference_moves else torch.zeros_like(hidden),
            backend="reference",
        )
        return out.logprobs, out.entropy, out.logsumexp, out.kl

    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda hidden: run(hidden, weight, bias), hidden)
    weight.requires_grad_()
    bias.requires_grad_()
    outputs = slice(3 if reference_moves else 4)
    assert torch.autograd.gradcheck(lambda *t: run(*t)[outputs], (hidden, weight, bias))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the C++ extension")
@pytest.mark.parametrize("sizes", [(1024, 512, 256, 192, 128, 64, 32, 16), (1024, 256), (1024,)])
def test_tiles_cover_the_rows_and_little_more(sizes):
    for n in (0, 1, 16, 17, 44, 300, 424, 1024, 1500, 4096):
        tiles = cpu._tiles(n, sizes)
        ends = [begin + size for begin, size in tiles]
        assert [begin for begin, _ in tiles] == [0, *ends][: len(tiles)]
        assert {size for _, size in tiles} <= set(sizes)
        if tiles:
            begin, size = tiles[-1]
            assert begin < n <= ends[-1]
            assert ends[-1] - n <= size // 4 or size == sizes[-1]


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the C++ extension")
def test_backward_takes_tiles_of_the_forward():
    """It makes the logits again on those, and needs them to the bit."""
    for depth, counts in ((256, (1008,)), (64, (64, 1008))):
        forward, backward = (cpu._sizes(depth, counts, b, torch.get_num_threads()) for b in (0, 1))
        assert set(backward) <= set(forward) and max(forward) == max(backward) == cpu.ROWS
        assert list(forward) == sorted(forward, reverse=True)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the C++ extension")
def test_a_target_that_nobody_could_check_gives_nan():
    """Under torch.compile, as on a GPU, targets are not looked at before they are used."""
    inputs = make_inputs(4, 16, 20, "cpu")
    targets = torch.tensor([3, 20, -1, -100])
    rest = (None, torch.ones(()), 0.0, None, -100, None, "cpu")
    logprobs, entropy, *_ = torch.ops.hydra.linear_logprob_fwd(
        inputs["hidden"], inputs["weight"], targets, *rest
    )
    assert logprobs.isnan().tolist() == [False, True, True, False]
    assert entropy.isfinite().all()

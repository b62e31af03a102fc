"""The kernels of lora_linear against float64, and the ops under torch.compile."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from hydra_kernels import Projection, lora_linear, lora_linear_group
from hydra_kernels.backends import registry
from hydra_kernels.ops.lora_linear import gated_linear
from tests.numerics import assert_no_worse_than_torch, device_of, training_backends
from tests.ops.test_lora_linear import make_layer

OP = "lora_linear"
KERNELS = training_backends(OP)
FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
# base, adapters
MIXES = [
    (FLOAT, FLOAT),
    (BFLOAT, BFLOAT),
    (BFLOAT, FLOAT),
    (HALF, HALF),
    (HALF, FLOAT),
    (FLOAT, BFLOAT),
]
# one element; ranks below a vector and columns below a block; several blocks and odd ends of all;
# ranks past one block of the C++ kernels
SHAPES = [
    ((1, 1), 1, 1, (1,)),
    ((2, 3), 7, 5, (2, 3)),
    ((3, 37), 300, 131, (16, 5)),
    ((2, 50), 72, 200, (70, 8, 40)),
]


def runs(backend, *dtypes):
    """Whether the dtypes can be tested on this backend here."""
    if backend == "cpu":
        return True
    # Triton's interpreter gets bfloat16 products wrong.
    return device_of(backend) == "cuda" or (BFLOAT not in dtypes and len(set(dtypes)) == 1)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def run(inputs, n, scaling, ids, dropout, seed, upstream, backend, function=lora_linear):
    """y and the gradients of all inputs, (x, weight, bias, a..., b...)."""
    inputs = leaves(*inputs)
    x, weight, bias, *adapters = inputs
    y = function(
        x,
        weight,
        adapters[:n],
        adapters[n:],
        scaling,
        adapter_ids=ids,
        bias=bias,
        dropout=dropout,
        seed=seed,
        backend=backend,
    )
    grads = torch.autograd.grad(y, inputs, upstream.to(y.dtype))
    return [y.detach(), *grads]


NAMES = ["y", "dx", "dweight", "dbias"]


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}-K{s[1]}-N{s[2]}-R{s[3]}")
@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "-".join(str(d)[6:] for d in m))
@pytest.mark.parametrize("backend", KERNELS)
def test_as_near_to_float64_as_torch(backend, mix, shape, dropout):
    if not runs(backend, *mix):
        pytest.skip(f"{mix} on {backend} needs a GPU")
    leading, k, n, ranks = shape
    device = device_of(backend)
    weight, bias, a, b, scaling = make_layer(n, k, ranks, *mix, device=device)
    x = torch.randn(*leading, k, device=device).to(mix[0])
    inputs = [x, weight, bias, *a, *b]
    ids = torch.randint(-1, len(ranks), leading, device=device)  # 1 in n + 1 rows is off
    seed = torch.tensor([3, 4], device=device)
    upstream = torch.randn(*leading, n, device=device)
    settings = (len(ranks), scaling, ids, dropout, seed, upstream)
    actual = run(inputs, *settings, backend)
    same = run(inputs, *settings, "reference")
    exact = run([t.double() for t in inputs], *settings, "reference")
    for i, (mine, torchs, right) in enumerate(zip(actual, same, exact, strict=True)):
        name = NAMES[i] if i < len(NAMES) else f"adapter {i - len(NAMES)}"
        # one ulp of the largest value: the reference rounds once or twice, and may be lucky
        ulp = torch.finfo(torchs.dtype).eps * max(right.abs().max().item(), 1e-3)
        try:
            assert_no_worse_than_torch(mine, torchs, right, atol=2 * ulp)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("backend", KERNELS)
def test_without_ids_only_adapter_0_runs(backend):
    device = device_of(backend)
    weight, bias, a, b, scaling = make_layer(6, 5, (2, 3), device=device)
    x = torch.randn(4, 5, device=device)
    lora_a = leaves(*a)
    y = lora_linear(x, weight, lora_a, b, scaling, bias=bias, backend=backend)
    torch.testing.assert_close(y, F.linear(x, weight, bias) + scaling[0] * x @ a[0].T @ b[0].T)
    assert torch.autograd.grad(y.sum(), lora_a, allow_unused=True)[1] is None


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "a", "b"])
def test_one_gradient_alone(backend, wanted):
    device = device_of(backend)
    weight, bias, (a,), (b,), _ = make_layer(6, 5, (2,), device=device)
    tensors = {"x": torch.randn(4, 5, device=device), "weight": weight, "bias": bias}
    tensors |= {"a": a, "b": b}
    upstream = torch.randn(4, 6, device=device)

    def gradient(backend):
        given = {n: t.clone().requires_grad_(n == wanted) for n, t in tensors.items()}
        y = lora_linear(
            given["x"], given["weight"], given["a"], given["b"], 0.7,
            bias=None if wanted == "weight" else given["bias"], backend=backend,
        )  # fmt: skip
        y.backward(upstream)
        assert all((t.grad is not None) == (n == wanted) for n, t in given.items())
        return given[wanted].grad

    torch.testing.assert_close(gradient(backend), gradient("reference"))


@pytest.mark.parametrize("backend", KERNELS)
def test_strides_and_integer_types_do_not_matter(backend):
    device = device_of(backend)
    weight, bias, (a,), (b,), _ = make_layer(6, 10, (4,), device=device)
    x = torch.randn(3, 5, 10, device=device)
    ids = torch.tensor([0, -1, 0], device=device)
    upstream = torch.randn(3, 5, 6, device=device)
    settings = (1, 0.7, ids, 0.25, torch.tensor([5], device=device))
    expected = run([x, weight, bias, a, b], *settings, upstream, backend)

    def strided(t):
        wide = torch.stack((t, torch.full_like(t, torch.nan)), dim=-1)
        return wide[..., 0]

    def transposed(t):
        return t.t().contiguous().t()

    odd = [strided(x), transposed(weight), strided(bias), transposed(a), transposed(b)]
    for tensors, out in (
        (odd, strided(upstream)),
        ([x.transpose(0, 1).contiguous().transpose(0, 1), *odd[1:]], upstream),
    ):
        # clone() would make them contiguous
        given = [t.detach().requires_grad_() for t in tensors]
        y = lora_linear(
            *given[:2], *given[3:], 0.7, bias=given[2], adapter_ids=ids.to(torch.int8),
            dropout=0.25, seed=5, backend=backend,
        )  # fmt: skip
        actual = [y.detach(), *torch.autograd.grad(y, given, out)]
        for mine, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("backend", KERNELS)
def test_an_adapter_of_zeros_leaves_the_base_bit_for_bit(backend):
    """Before the first update actor and reference agree, so that ratio is 1 and KL 0."""
    device = device_of(backend)
    for m, k, n in [(1, 7, 5), (33, 64, 100), (100, 300, 1000), (17, 2048, 24)]:
        for has_bias in (False, True):
            weight, bias, a, b, _ = make_layer(n, k, (4,), device=device, bias=has_bias)
            x = torch.randn(m, k, device=device)
            y = lora_linear(x, weight, a[0], b[0] * 0, 2.0, bias=bias, backend=backend)
            expected = F.linear(x, weight, bias)
            if device == "cpu":
                assert torch.equal(y, expected), (m, k, n)
            else:
                torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_a_group_equals_its_layers(backend, with_ids):
    device = device_of(backend)
    x = torch.randn(2, 9, 20, device=device)
    ids, dropout = (torch.tensor([1, 0], device=device), 0.0) if with_ids else (None, 0.3)
    sizes = [(6, (2, 3)), (10, (4, 1)), (3, (8, 8))]
    layers = [make_layer(n, 20, ranks, device=device) for n, ranks in sizes]
    upstream = [torch.randn(2, 9, n, device=device) for n, _ in sizes]

    def gradients(group, used=(0, 1, 2)):
        x_leaf, *flat = leaves(x, *(t for w, c, a, b, _ in layers for t in (w, c, *a, *b)))
        projections = []
        for i, layer in enumerate(layers):
            w, c, a0, a1, b0, b1 = flat[6 * i : 6 * i + 6]
            projections.append(Projection(w, (a0, a1), (b0, b1), layer[4], c))
        if group:
            ys = lora_linear_group(
                x_leaf, projections, adapter_ids=ids, dropout=dropout, seed=7, backend=backend
            )
        else:
            ys = [
                lora_linear(
                    x_leaf, p.weight, p.lora_a, p.lora_b, p.scaling, adapter_ids=ids, bias=p.bias,
                    dropout=dropout, seed=7, backend="reference",
                )
                for p in projections
            ]  # fmt: skip
        loss = sum((ys[i] * upstream[i]).sum() for i in used)
        grads = torch.autograd.grad(loss, [x_leaf, *flat], allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g
                 for g, t in zip(grads, [x_leaf, *flat], strict=True)]  # fmt: skip
        return [*ys, *grads]

    for used in ((0, 1, 2), (2,)):
        for mine, other in zip(gradients(True, used), gradients(False, used), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_group_refusals():
    x = torch.randn(3, 4)
    w, c, a, b, s = make_layer(2, 4, (1, 1))
    with pytest.raises(ValueError, match="at least one"):
        lora_linear_group(x, [])
    with pytest.raises(ValueError, match="as many adapters"):
        lora_linear_group(x, [Projection(w, a, b, s), Projection(w, a[:1], b[:1], s[:1])])
    with pytest.raises(ValueError, match="x must be"):
        lora_linear_group(x, [Projection(w[:, :3], a, b, s)])
    for ids, message in ((torch.zeros(3), "integers"), (torch.tensor([0, 1]), "leading part")):
        with pytest.raises(ValueError, match=f"adapter_ids must be .*{message}"):
            lora_linear_group(x, [Projection(w, a, b, s)], adapter_ids=ids)
    with pytest.raises(ValueError, match="between -1 and 1, got 2"):
        lora_linear_group(x, [Projection(w, a, b, s)], adapter_ids=torch.tensor(2))


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ extension is not built")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_of_the_cpu_kernel(dropout):
    """In float64 where it is BLAS; with dropout, C++ in float32, against a finite difference."""
    dtype = torch.float64 if dropout == 0.0 else torch.float32
    weight, bias, a, b, scaling = make_layer(4, 6, (2, 3), dtype)
    x = torch.randn(2, 3, 6, dtype=dtype)
    ids = torch.tensor([[0, 1, -1], [1, 1, 0]])
    inputs = leaves(x, weight, bias, *a, *b)

    def f(x, weight, bias, *adapters):
        return lora_linear(
            x, weight, adapters[:2], adapters[2:], scaling, adapter_ids=ids, bias=bias,
            dropout=dropout, seed=9, backend="cpu",
        )  # fmt: skip

    # the function is linear in each input, so that a long step loses nothing
    loose = {} if dropout == 0.0 else {"eps": 0.5, "atol": 1e-3, "nondet_tol": 0.0}
    assert torch.autograd.gradcheck(f, inputs, **loose)


LEVELS = """
import sys, torch
from hydra_kernels import lora_linear
torch.manual_seed(0)
out = []
for r in (3, 20, 70):
    x, w, b = torch.randn(37, 300), torch.randn(131, 300), torch.randn(131, r)
    a = torch.randn(r, 300, requires_grad=True)
    x.requires_grad_()
    b.requires_grad_()
    y = lora_linear(x, w, a, b, 0.5, dropout=0.3, seed=7, backend="cpu")
    out += [y.detach(), *torch.autograd.grad(y.square().mean(), (x, a, b))]
    few = lora_linear(x[:9], w, (a, a), (b, b), 0.5, adapter_ids=torch.arange(9) % 3 - 1)
    out += [few.detach(), *torch.autograd.grad(few.square().mean(), (x, a, b))]
    # Whole numbers are exact in float32, so that no level rounds to another bfloat16.
    x, w, a, b = (t.detach().mul(2).round() for t in (x[:21], w, a, b))
    out.append(lora_linear(x.bfloat16(), w.bfloat16(), a, b, 0.5, backend="cpu").float())
torch.save(out, sys.argv[1])
"""


@pytest.mark.parametrize("level", ["baseline", "v3"])
@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ extension is not built")
def test_lower_vector_levels_compute_the_same(level, tmp_path, monkeypatch):
    """Each level has kernels of its own; a process runs one, read when it first asks."""
    path = str(tmp_path / "low")
    env = {**os.environ, "HYDRA_CPU_ISA": level, "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", LEVELS, path], env=env, check=True)
    mine = str(tmp_path / "mine")
    monkeypatch.setattr(sys, "argv", ["", mine])
    exec(LEVELS, {})
    for low, high in zip(torch.load(path), torch.load(mine), strict=True):
        torch.testing.assert_close(low, high, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ extension is not built")
def test_threads_do_not_change_a_bit():
    weight, _, (a,), (b,), _ = make_layer(300, 500, (24,))
    x = torch.randn(700, 500)
    inputs = [x, weight, torch.zeros(300), a, b]
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            settings = (1, 0.5, None, 0.2, 11, torch.ones(700, 300))
            results.append(run(inputs, *settings, "cpu")[4:])  # C++ makes dA and dB
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("backend", KERNELS)
def test_ids_out_of_range_are_refused_by_the_kernel_too(backend):
    """The op looks before a reference runs; a kernel on the CPU must do it itself."""
    if device_of(backend) != "cpu":
        pytest.skip("HYDRA_CHECK=1 asks for this on a GPU")
    weight, _, a, b, s = make_layer(3, 4, (2,))
    for dropout in (0.0, 0.5):
        with pytest.raises(ValueError, match="between -1 and 0, got 1"):
            gated_linear(
                torch.randn(2, 4), weight, None, a, b, s, (0,), torch.tensor([0, 1]), dropout, 0,
                num_adapters=1, backend=backend,
            )  # fmt: skip


# ---- torch.compile


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ extension is not built")
def test_opcheck():
    weight, bias, a, b, scaling = make_layer(5, 6, (2, 3))
    x = torch.randn(2, 3, 6).requires_grad_()
    arguments = (
        x, [weight], [bias], leaves(*a), leaves(*b), [True], [2], [0, 1], scaling, 2, 0.3,
        torch.tensor([0, -1]), torch.tensor([1, 2]), "cpu",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.hydra.lora_linear_fwd.default, arguments)


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ extension is not built")
def test_compiled_equals_eager_and_new_ids_and_seeds_do_not_recompile():
    weight, bias, a, b, scaling = make_layer(5, 6, (2, 3))
    x, *adapters = leaves(torch.randn(2, 3, 6), *a, *b)
    upstream = torch.randn(2, 3, 5)
    graphs = []

    def step(x, adapters, ids, seed):
        y = lora_linear(
            x, weight, adapters[:2], adapters[2:], scaling, adapter_ids=ids, bias=bias,
            dropout=0.3, seed=seed, backend="cpu",
        )  # fmt: skip
        q, k = lora_linear_group(
            y, [Projection(y[0, :, :], adapters[0][:, :5], adapters[2][:3], 1.0)] * 2,
            backend="cpu",
        )  # fmt: skip
        return q * k

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    counted = torch.compile(step, fullgraph=True, backend=backend)
    upstream = torch.randn(2, 3, 3)
    for ids, seed in (([0, 1], [1, 2]), ([1, -1], [3, 4]), ([-1, -1], [5, 6])):
        arguments = (x, adapters, torch.tensor(ids), torch.tensor(seed))
        expected, actual = step(*arguments), compiled(*arguments)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, [x, *adapters], upstream, allow_unused=True),
            torch.autograd.grad(expected, [x, *adapters], upstream, allow_unused=True),
        )
        counted(*arguments)
    assert len(graphs) == 1


@pytest.mark.gpu
def test_a_captured_graph_obeys_new_ids_and_draws_new_masks():
    weight, _, a, b, scaling = make_layer(64, 64, (16, 16), device="cuda")
    x = torch.randn(8, 64, device="cuda")
    ids = torch.zeros(8, dtype=torch.long, device="cuda")

    def call(dropout):
        return lora_linear(x, weight, a, b, scaling, adapter_ids=ids, dropout=dropout)

    for dropout in (0.0, 0.5):
        call(dropout)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(dropout)
        outputs = []
        for value in (0, 1, -1, -1):
            ids.fill_(value)
            graph.replay()
            outputs.append(out.clone())
        torch.testing.assert_close(outputs[2], F.linear(x, weight))
        if dropout == 0.0:
            for value in (0, 1):
                ids.fill_(value)
                torch.testing.assert_close(outputs[value], call(0.0))
        else:
            ids.fill_(0)
            graph.replay()
            assert not torch.equal(out, outputs[0])


@pytest.mark.gpu
def test_ids_out_of_range_are_refused_on_a_gpu_when_asked(monkeypatch):
    weight, _, a, b, s = make_layer(3, 4, (2,), device="cuda")
    x = torch.randn(2, 4, device="cuda")
    ids = torch.tensor([0, 1], device="cuda")
    monkeypatch.setenv("HYDRA_CHECK", "1")
    with pytest.raises(ValueError, match="between -1 and 0, got 1"):
        lora_linear(x, weight, a, b, s, adapter_ids=ids)


def test_the_group_has_the_backends_of_the_op():
    assert registry.backends("lora_linear_group") == registry.backends(OP)

"""Products on a CPU that round a row alike whatever the number of rows, and those of bfloat16."""

import math

import pytest
import torch

from hydra_kernels import linear_logprob
from hydra_kernels.backends import extension
from hydra_kernels.backends.cpu import linear_logprob as cpu
from hydra_kernels.backends.cpu import products
from tests.ops.test_linear_logprob import make_inputs, run, to_double

pytestmark = pytest.mark.skipif(extension.module is None, reason="needs the C++ extension")
TILES = pytest.mark.skipif(
    not extension.has_bf16_blas, reason="needs a processor with bfloat16 tiles (AMX) and MKL"
)
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=TILES)]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("piece", [0, 7, 40, 64])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_product(dtype, b_transposed, a_transposed, adds, piece):
    """Of parts of wider matrices, into a part of one, whichever way they lie."""
    m, n, k = 19, 35, 64
    a = torch.randn(k, m + 5).t()[:m] if a_transposed else torch.randn(m, k + 5)[:, :k]
    b = torch.randn(n, k + 3)[:, :k].t() if b_transposed else torch.randn(k, n + 3)[:, :n]
    a, b = (t.to(dtype) for t in (a, b))
    whole = torch.randn(m + 1, n + 2)
    before = whole.clone()
    out = whole[:m, :n]
    expected = a.double() @ b.double() + (before[:m, :n].double() if adds else 0.0)
    products.multiply(out, a, b, adds=adds, piece=piece)
    # sums of 64 terms in float32, each product of two bfloat16 numbers exact
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    whole[:m, :n] = before[:m, :n]
    assert torch.equal(whole, before), "wrote outside of out"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_what_is_found_agrees(two_threads, backward, dtype):
    """At a depth that MKL sums in pieces of 384, for 1024 rows but not for 64."""
    sizes, inner, outer = (1024, 192, 64, 16), 1024, 1000
    found = products.pieces(sizes, inner, (outer,), backward, dtype, 2)
    assert found[1024] == 0 and set(found) <= set(sizes)
    k, n = (outer, inner) if backward else (inner, outer)
    a, b = torch.randn(1024, k).to(dtype), torch.randn(k, n).to(dtype)
    before = torch.randn(1024, n)
    large = before.clone()
    products.multiply(large, a, b, adds=backward)
    for size, piece in found.items():
        small = before[100 : 100 + size].clone()
        rows = slice(100, 100 + small.shape[0])
        products.multiply(small, a[rows], b, adds=backward, piece=piece)
        assert torch.equal(small, large[rows]), size


def test_rounding_that_differs_is_seen(monkeypatch):
    """Where few rows are summed in other pieces than many, only those pieces are taken."""
    real = products.multiply

    def as_some_blas(out, a, b, *, adds=False, piece=0):
        real(out, a, b, adds=adds, piece=piece or (128 if out.shape[0] == 1024 else 0))

    monkeypatch.setattr(products, "multiply", as_some_blas)
    found = products.pieces.__wrapped__((1024, 512, 16), 300, (70,), False, torch.float32, 1)
    assert found == {1024: 0, 512: 128, 16: 128}
    monkeypatch.setattr(products, "PIECES", (256,))
    found = products.pieces.__wrapped__((1024, 512, 16), 300, (70,), False, torch.float32, 1)
    assert found == {1024: 0}


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
def test_small_batches_take_small_tiles_at_any_depth(two_threads):
    sizes = cpu._sizes(1024, (1000,), True, 2)
    assert min(sizes) == 16, "64 rows would be multiplied as 192"


def test_gradients_of_few_rows_are_those_of_many(two_threads):
    """MKL sums 1000 columns in pieces for 1024 rows, and at once for 64."""
    hidden, weight, targets = torch.randn(1024, 256), torch.randn(1000, 256), torch.arange(1000)
    targets = torch.cat((targets, targets[:24]))
    found = []
    for rows in (slice(None), slice(100, 164)):
        x = hidden[rows].clone().requires_grad_()
        out = linear_logprob(x, weight, targets[rows])
        found.append(torch.autograd.grad(out.entropy.sum(), x)[0])
    assert torch.equal(found[0][100:164], found[1])


def half_inputs(M, D, V):
    weight = (3.0 / math.sqrt(D) * torch.randn(V, D)).bfloat16()
    hidden = torch.randn(M, D).bfloat16()
    ref_hidden = (hidden + 0.3 * torch.randn(M, D)).bfloat16()
    return hidden, weight, torch.randint(V, (M,)), torch.randn(V).bfloat16(), ref_hidden


@TILES
@pytest.mark.parametrize("M, D, V", [(37, 48, 1523), (5, 3, 40), (1, 16, 1)])
def test_bfloat16_with_and_without_tiles(monkeypatch, M, D, V):
    """Its products are as float32's; of the gradients dz is rounded to bfloat16 before they are."""
    hidden, weight, targets, bias, ref_hidden = half_inputs(M, D, V)
    upstream = torch.randn(4, M)
    found = []
    for tiles in (True, False):
        monkeypatch.setattr(extension, "has_bf16_blas", tiles)
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        out = linear_logprob(
            leaves[0], leaves[1], targets, bias=leaves[2], ref_hidden=ref_hidden, softcap=8.0
        )
        terms = zip((out.logprobs, out.entropy, out.logsumexp, out.kl), upstream, strict=True)
        found.append((out, torch.autograd.grad(sum((t * g).sum() for t, g in terms), leaves)))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert a.dtype == torch.bfloat16
        # that of dz and that of each result, by 2^-9
        assert (a.double() - b.double()).norm() <= 3 * 2**-9 * b.double().norm()


@TILES
def test_bfloat16_weights_that_lie_otherwise():
    hidden, weight, targets, *_ = half_inputs(9, 32, 200)
    exact = linear_logprob(hidden, weight, targets)
    for other in (weight.t().contiguous().t(), weight.repeat_interleave(2, 1)[:, ::2]):
        assert not other.is_contiguous()
        for a, b in zip(linear_logprob(hidden, other, targets)[:3], exact[:3], strict=True):
            assert torch.equal(a, b)
    same = weight[:1].expand(200, -1)
    out = linear_logprob(hidden, same, targets)
    torch.testing.assert_close(out.entropy, torch.full((9,), math.log(200)), rtol=1e-6, atol=1e-6)


@TILES
def test_bfloat16_gradients_hold_no_float32_copy_of_the_head():
    """A block's gradients of logits lie where its logits were."""
    walk = cpu._Walk(torch.randn(5000, 64).bfloat16(), 100, backward=True)
    z, _ = walk.products(
        walk.pack(torch.randn(100, 64).bfloat16(), None), None, walk.head(0, 992), 0, 100
    )
    assert walk.dlogits().data_ptr() == z.data_ptr()
    assert walk.head(0, 992).data_ptr() == walk.weight.data_ptr()


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_rows_longer_than_a_chunk_of_columns(bias, how, monkeypatch):
    """C++ takes 2048 columns at once, which is all of a block unless COLUMNS is raised."""
    monkeypatch.setattr(cpu, "COLUMNS", 8192)
    monkeypatch.setenv("HYDRA_LOGPROB_BUDGET_MB", "1024")
    assert len(cpu._blocks(2 * 2048 + 3, cpu._columns(1024.0))[0]) == 1
    inputs = make_inputs(6, 5, 2 * 2048 + 3, ignored=0.0, bias=bias)
    inputs["targets"] = torch.tensor([0, 2047, 2048, 4095, 4096, 4098])
    upstream = torch.randn(4, 6)
    results, grads = run(inputs, upstream, backend="cpu", **how)
    exact, exact_grads = run(to_double(inputs), upstream.double(), backend="reference", **how)
    for name, t in results.items():
        torch.testing.assert_close(t.double(), exact[name], rtol=1e-5, atol=1e-5)
    for grad, right in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=1e-4, atol=1e-5)

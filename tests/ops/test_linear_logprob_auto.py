"""memory="auto": small logits are kept for backward, which no bit of a result may show."""

import pytest
import torch

from hydra_kernels import linear_logprob
from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.cpu import linear_logprob as cpu

pytestmark = pytest.mark.skipif(extension.module is None, reason="needs the C++ extension")
D = cpu.SAVED_DEPTH


@pytest.fixture
def saves(monkeypatch):
    """Whether each forward pass saved."""
    seen = []
    kernel = registry.kernel("linear_logprob", "cpu")

    def fwd(inputs, save):
        seen.append(save is not None)
        return kernel.fwd(inputs, save)

    spied = registry.Kernel(fwd, kernel.bwd, kernel.unsupported, kernel.missing)
    monkeypatch.setitem(registry._KERNELS["linear_logprob"], "cpu", spied)
    return seen


def make_inputs(M, V, depth=D, ignored=0.1, dtype=torch.float32):
    hidden = torch.randn(M, depth)
    targets = torch.randint(V, (M,))
    targets[torch.rand(M) < ignored] = -100
    weight = (3.0 * depth**-0.5 * torch.randn(V, depth)).to(dtype)
    ref_hidden = (hidden + 0.3 * torch.randn(M, depth)).to(dtype)
    return hidden.to(dtype), weight, targets, ref_hidden, torch.randn(4, M)


def run(hidden, weight, targets, ref_hidden, upstream, call=linear_logprob, **kw):
    hidden = hidden.clone().requires_grad_()
    out = call(hidden, weight, targets, ref_hidden=ref_hidden, **kw)
    results = [out.logprobs, out.entropy, out.logsumexp]
    if ref_hidden is not None:
        results.append(out.kl)
    loss = sum((t * g).sum() for t, g in zip(results, upstream, strict=False))
    if call is linear_logprob:  # what is compiled goes backward once
        (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, hidden)
    if call is linear_logprob:
        assert torch.equal(first, grad), "backward changed what was kept"
    return [*(t.detach() for t in results), grad]


# one row; rows past the last tile's end and within what is kept; more than a block of columns
@pytest.mark.parametrize("M, V", [(1, 40), (45, 257), (250, 1500), (100, 33)])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("has_ref", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_recompute_bit_for_bit(saves, M, V, options, has_ref, dtype):
    hidden, weight, targets, ref_hidden, upstream = make_inputs(M, V, dtype=dtype)
    inputs = (hidden, weight, targets, ref_hidden if has_ref else None, upstream)
    kept = run(*inputs, **options)
    made = run(*inputs, memory="recompute", **options)
    assert saves == [True, False]
    for a, b in zip(kept, made, strict=True):
        assert torch.equal(a, b)


def test_a_row_does_not_depend_on_whether_its_batch_is_kept(saves, monkeypatch):
    monkeypatch.setenv("HYDRA_LOGPROB_BUDGET_MB", "8")
    hidden, weight, targets, ref_hidden, upstream = make_inputs(600, 1100)
    whole = run(hidden, weight, targets, ref_hidden, upstream)
    rows = slice(100, 300)
    part = run(hidden[rows], weight, targets[rows], ref_hidden[rows], upstream[:, rows])
    assert saves == [False, True]
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[rows], b)


def test_where_it_saves(monkeypatch):
    """At most a quarter of the budget, and only what backward would find the same."""

    def asks(M, V, depth=D, dtype=torch.float32, has_ref=False):
        x, w = (torch.empty(n, depth, dtype=dtype, device="meta") for n in (M, V))
        return cpu.saves_unasked(x, w, x if has_ref else None)

    assert asks(256, 8000) and asks(256, 8000, has_ref=True)
    assert asks(512, 8192) and not asks(513, 8192), "16 MiB"
    assert asks(256, 8192, has_ref=True) and not asks(257, 8192, has_ref=True)
    assert not asks(1, 8, depth=D - 1)
    for half in (torch.float16, torch.bfloat16):
        assert asks(512, 8192, D, half) and not asks(513, 8192, D, half), "in float32"
        assert not asks(1, 8, D - 1, half)
    monkeypatch.setenv("HYDRA_LOGPROB_BUDGET_MB", "1")
    assert asks(8, 8192) and not asks(9, 8192)


def test_saves_only_for_a_backward_pass(saves):
    hidden, weight, targets, *_ = make_inputs(9, 40)
    linear_logprob(hidden, weight, targets)
    with torch.no_grad():
        linear_logprob(hidden.requires_grad_(), weight, targets)
    assert saves == [False, False]
    linear_logprob(hidden, weight, targets)
    linear_logprob(hidden.detach(), weight, targets, bias=torch.zeros(40, requires_grad=True))
    assert saves == [False, False, True, True]


def test_compiles_with_the_choice_in_the_graph(saves):
    """fullgraph, on both sides of the limit, with sizes that change."""
    call = torch.compile(linear_logprob, fullgraph=True, dynamic=True, backend="aot_eager")
    for M, V in ((20, 300), (5000, 1000), (30, 400)):
        inputs = make_inputs(M, V, ignored=0.0)
        eager, compiled = run(*inputs), run(*inputs, call=call)
        assert saves[-2:] == [M < 1000, M < 1000]
        for a, b in zip(eager, compiled, strict=True):
            assert torch.equal(a, b)

"""linear_logprob under what torch wraps calls in: autocast, autograd twice, torch.func, compile."""

import pytest
import torch
import torch.utils.checkpoint

from hydra_kernels import linear_logprob
from tests.numerics import device_of
from tests.ops.test_linear_logprob import (
    ALL,
    BACKENDS,
    DIFFERENTIABLE,
    INTERPRETED,
    make_inputs,
    run,
)


@pytest.mark.parametrize("backend", ALL)
def test_autocast(backend):
    """The product takes autocast's dtype; the gradients come back in the parameters'."""
    device = device_of(backend)
    inputs = make_inputs(6, 16, 40, device)
    dtype = torch.bfloat16 if backend not in INTERPRETED else torch.float16
    with torch.autocast(device, dtype):
        out, grads = run(inputs, torch.ones(4, 6, device=device), backend=backend)
    half = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    expected = run(half, backend=backend)
    for name in expected:
        assert torch.equal(out[name], expected[name])
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_not_differentiable(backend):
    """Refused with an upstream that asks for a gradient and without, alone and in a sum."""
    inputs = make_inputs(3, 16, 20, device_of(backend))
    hidden, asking = inputs["hidden"].requires_grad_(), torch.ones(3, requires_grad=True)
    for upstream in (torch.ones(3), asking):
        out = linear_logprob(hidden, inputs["weight"], inputs["targets"], backend=backend)
        loss = (out.logprobs * upstream.to(hidden.device)).sum()
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="linear_logprob: .* no derivative of its own"):
            torch.autograd.grad(grad.square().sum() + hidden.sum(), hidden, retain_graph=True)
    (grad,) = torch.autograd.grad((out.logprobs * asking).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob: .* no derivative of its own"):
        torch.autograd.grad(grad.sum(), asking)  # of what comes from above alone


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_is_differentiable(backend):
    inputs = make_inputs(3, 16, 20, device_of(backend), bias=True)
    for name in ("hidden", "weight", "bias"):
        leaf = inputs[name].clone().requires_grad_()
        out = linear_logprob(**{**inputs, name: leaf}, backend=backend)
        (grad,) = torch.autograd.grad(out.kl.sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="linear_logprob: .* no derivative of its own"):
            torch.autograd.grad(grad.square().sum() + leaf.sum(), leaf)


@pytest.mark.parametrize("backend", BACKENDS)
def test_create_graph_through_a_checkpoint(backend):
    """What is checkpointed may be unpacked once: also by a gradient that might be refused later."""
    inputs = make_inputs(3, 16, 20, device_of(backend))
    hidden = inputs["hidden"].requires_grad_()

    def forward(hidden):
        return linear_logprob(hidden, inputs["weight"], inputs["targets"], backend=backend).entropy

    loss = torch.utils.checkpoint.checkpoint(forward, hidden, use_reentrant=False).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(forward(hidden).sum(), hidden)[0])


def test_transforms_agree_with_a_loop():
    """torch.func's tensors of targets have no values to look at."""
    inputs = make_inputs(12, 8, 20)
    hidden, ref_hidden = inputs["hidden"].view(4, 3, 8), inputs["ref_hidden"].view(4, 3, 8)
    targets = inputs["targets"].view(4, 3)

    def loss(hidden, targets, ref_hidden):
        out = linear_logprob(hidden, inputs["weight"], targets, ref_hidden=ref_hidden)
        return (out.logprobs + out.kl).sum()

    leaf = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(map(loss, leaf, targets, ref_hidden)), leaf)
    actual = torch.vmap(torch.func.grad(loss))(hidden, targets, ref_hidden)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_may_be_changed_in_place(backend):
    inputs = make_inputs(3, 16, 20, device_of(backend))
    grads = []
    for change in (False, True):
        hidden = inputs["hidden"].clone().requires_grad_()
        out = linear_logprob(**{**inputs, "hidden": hidden}, backend=backend)
        twice = [getattr(out, n).mul_(2) if change else getattr(out, n) * 2 for n in DIFFERENTIABLE]
        grads.append(torch.autograd.grad(sum(t.sum() for t in twice), hidden)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("save", [None, torch.float32])
@pytest.mark.parametrize("has_ref", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, has_ref, save):
    inputs = make_inputs(5, 16, 40, device_of(backend))
    for name in ("hidden", "weight", "bias"):
        inputs[name].requires_grad_()
    temperature = torch.tensor(0.8, device=device_of(backend))
    torch.library.opcheck(
        torch.ops.hydra.linear_logprob_fwd,
        (
            inputs["hidden"],
            inputs["weight"],
            inputs["targets"],
            inputs["bias"],
            temperature,
            0.0,
            inputs["ref_hidden"] if has_ref else None,
            -100,
            save,
            backend,
        ),
    )


@pytest.mark.parametrize("has_ref", [False, True])
def test_compiles(has_ref):
    """fullgraph, as eager to the bit, and a new temperature does not recompile."""
    device = device_of(BACKENDS[0] if BACKENDS else "reference")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(hidden, weight, targets, ref_hidden, temperature):
        return linear_logprob(
            hidden, weight, targets, temperature=temperature, ref_hidden=ref_hidden
        )

    for value in (0.7, 1.3):
        inputs = make_inputs(9, 16, 40, device, bias=False)
        if not has_ref:
            inputs["ref_hidden"] = None
        upstream = torch.randn(4, 9, device=device)
        temperature = torch.tensor(value, device=device)
        eager, eager_grads = run(inputs, upstream, temperature=temperature)
        leaves = [inputs[n].requires_grad_() for n in ("hidden", "weight")]
        out = step(*leaves, inputs["targets"], inputs["ref_hidden"], temperature)
        terms = zip((out.logprobs, out.entropy, out.logsumexp, out.kl), upstream, strict=True)
        loss = sum((t * g).sum() for t, g in terms if t is not None)
        for name, t in eager.items():
            assert torch.equal(getattr(out, name), t)
        for a, b in zip(torch.autograd.grad(loss, leaves), eager_grads, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1

"""How the gradients of ppo_loss are handed out: again, changed, many at once, with derivatives."""

import pytest
import torch

from hydra_kernels import ppo_loss
from tests.numerics import device_of
from tests.ops.test_ppo_loss import ALL, BACKENDS, COEFS, DIFFERENTIABLE, make_inputs, run


@pytest.mark.parametrize("backend", ALL)
def test_backward_again(backend):
    """Gradients made by the forward are handed out without a copy where that cannot be noticed."""
    inputs = make_inputs((2, 50), device_of(backend))
    expected = run(inputs, torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]), backend="reference")[1]
    leaves = {n: inputs[n].clone().requires_grad_() for n in DIFFERENTIABLE}
    loss = ppo_loss(**{**inputs, **leaves}, **COEFS, backend=backend).loss
    for times in (1, 2, 3):  # a leaf adds to its .grad in place
        loss.backward(retain_graph=True)
        for leaf, once in zip(leaves.values(), expected, strict=True):
            torch.testing.assert_close(leaf.grad, times * once, rtol=1e-5, atol=1e-8)

    further = {n: leaf * 1 for n, leaf in leaves.items()}  # not leaves, as in a model
    for scale in (1.0, 2.0):
        loss = ppo_loss(**{**inputs, **further}, **COEFS, backend=backend).loss
        for _ in range(2):
            grads = torch.autograd.grad(scale * loss, list(further.values()), retain_graph=True)
            for grad, once in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad, scale * once, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("bonus", [True, False])
@pytest.mark.parametrize("leaves", [True, False])
def test_a_gradient_handed_out_is_the_callers_to_change(backend, bonus, leaves):
    """In place: by the caller, by an optimizer, by a leaf that adds to its .grad."""
    inputs = make_inputs((2, 50), device_of(backend))
    names = DIFFERENTIABLE if bonus else DIFFERENTIABLE[:2]
    given = {n: inputs[n] if n in names or n not in DIFFERENTIABLE else None for n in inputs}
    for name in names:
        given[name] = given[name].requires_grad_()
        given[name] = given[name] if leaves else given[name] * 1
    asked = [given[n] for n in names]
    loss = ppo_loss(**given, **COEFS, backend=backend).loss
    first = torch.autograd.grad(loss, asked, retain_graph=True)
    expected = [g.clone() for g in first]
    for g in first:
        g.zero_()
    second = torch.autograd.grad(loss, asked)  # the last one: may be what was saved
    for g, e in zip(second, expected, strict=True):
        assert torch.equal(g, e)
        assert g.any()
        g.zero_()
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, asked)
    loss = ppo_loss(**given, **COEFS, backend=backend).loss
    for g, e in zip(torch.autograd.grad(loss, asked), expected, strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_upstream_gradients_at_once(backend):
    inputs = make_inputs((2, 9), device_of(backend))
    del inputs["entropy"], inputs["kl"]
    logprobs = inputs["logprobs"].requires_grad_()
    inputs["logprobs"] = logprobs * 1
    loss = ppo_loss(**inputs, backend=backend).loss
    (one,) = torch.autograd.grad(loss, logprobs)
    inputs["logprobs"] = logprobs * 1
    loss = ppo_loss(**inputs, backend=backend).loss
    upstream = torch.tensor([1.0, 2.0], device=loss.device)
    (grads,) = torch.autograd.grad(loss, logprobs, upstream, is_grads_batched=True)
    torch.testing.assert_close(grads, torch.stack((one, 2 * one)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_loss_alone_has_a_gradient_without_its_coefficient(backend):
    inputs = make_inputs((2, 50), device_of(backend))
    grads = []
    for name in (backend, "reference"):
        values = inputs["values"].clone().requires_grad_()
        out = ppo_loss(**{**inputs, "values": values}, vf_coef=0.0, backend=name)
        grads.append(torch.autograd.grad(out.value_loss, values)[0])
    assert grads[0].any()
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_not_differentiable(backend):
    """A gradient penalty would miss its own share: refused, also where the rest of it asks."""
    inputs = make_inputs((2, 9), device_of(backend))
    for name in DIFFERENTIABLE:
        leaf = inputs[name].clone().requires_grad_()
        loss = ppo_loss(**{**inputs, name: leaf}, **COEFS, backend=backend).loss
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="ppo_loss: its gradient has no derivative"):
            torch.autograd.grad(grad.square().sum() + leaf.square().sum(), leaf)
    inputs |= dict(entropy=None, kl=None, logprobs=inputs["logprobs"].requires_grad_())
    loss = ppo_loss(**inputs, **COEFS, backend=backend).loss
    (grad,) = torch.autograd.grad(loss, inputs["logprobs"], create_graph=True, retain_graph=False)
    with pytest.raises(RuntimeError, match="ppo_loss: its gradient has no derivative"):
        torch.autograd.grad(grad.sum(), inputs["logprobs"])
    inputs |= dict(logprobs=inputs["logprobs"].detach(), kl=inputs["mask"].float())
    name, leaf = "kl", inputs["kl"].requires_grad_()
    scale = torch.ones((), device=leaf.device, requires_grad=True)
    loss = scale * ppo_loss(**{**inputs, name: leaf}, **COEFS, backend=backend).loss
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="ppo_loss: its gradient has no derivative"):
        torch.autograd.grad(grad.sum(), scale)  # of what comes from above alone


@pytest.mark.parametrize("backend", ALL)
def test_constants_that_ask_for_a_gradient_get_none(backend):
    inputs = make_inputs((2, 9), device_of(backend))
    constants = ("old_logprobs", "old_values", "advantages", "returns")
    inputs |= {name: inputs[name].requires_grad_() for name in constants}
    assert not any(t.requires_grad for t in ppo_loss(**inputs, **COEFS, backend=backend))
    logprobs = inputs["logprobs"].requires_grad_()
    ppo_loss(**inputs, **COEFS, backend=backend).loss.backward()
    assert logprobs.grad is not None
    assert all(inputs[name].grad is None for name in constants)


@pytest.mark.parametrize("backend", ALL)
def test_results_may_be_changed_in_place(backend):
    inputs = make_inputs((2, 9), device_of(backend))
    inputs["logprobs"] = inputs["logprobs"].requires_grad_() * 1
    out = ppo_loss(**inputs, **COEFS, backend=backend)
    (kept,) = torch.autograd.grad(out.loss, inputs["logprobs"], retain_graph=True)
    expected = kept.clone()
    for statistic in out[1:]:
        statistic.mul_(100)
    loss = out.loss
    loss += 3.0
    (first,) = torch.autograd.grad(out.loss, inputs["logprobs"], retain_graph=True)
    (second,) = torch.autograd.grad(out.loss, inputs["logprobs"])
    first.zero_()
    assert torch.equal(second, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vf_coef", [0.5, 0.0])
@pytest.mark.parametrize("upstream", [{0: 1.0}, {0: 2.0}, {0: 1.0, 1: 0.5}, {0: 1.0, 2: 0.5}])
@pytest.mark.parametrize("asked", [("logprobs", "values"), ("values",), ("logprobs",)])
def test_gradients_of_the_clipped_losses(backend, vf_coef, upstream, asked):
    """Only for an upstream gradient of 1 of the loss alone are they those that forward made."""
    inputs = make_inputs((2, 50), device_of(backend)) | dict(entropy=None, kl=None)
    found = []
    for name in (backend, "reference"):
        leaves = {n: inputs[n].clone().requires_grad_() for n in asked}
        out = ppo_loss(**{**inputs, **leaves}, vf_coef=vf_coef, backend=name)
        total = [out[i] for i in upstream if out[i].requires_grad]
        weights = [
            torch.tensor(upstream[i], device=t.device)
            for i, t in enumerate(out[:3])
            if i in upstream and t.requires_grad
        ]
        found.append(torch.autograd.grad(total, list(leaves.values()), weights))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)

"""linear_logprob: the definition, by hand and by finite differences, and what it refuses."""

import math

import pytest
import torch

from hydra_kernels import LinearLogprob, linear_logprob
from hydra_kernels.backends import registry

OP = "linear_logprob"
BACKENDS = [REFERENCE := registry.REFERENCE]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """z = (0, log 3): p = (1/4, 3/4); the reference's z = 0: q = (1/2, 1/2)."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3.0)]])
    out = linear_logprob(
        hidden, weight, torch.tensor([1]), ref_hidden=torch.zeros(1, 1), backend=backend
    )
    assert isinstance(out, LinearLogprob)
    entropy = 0.25 * math.log(4.0) + 0.75 * math.log(4.0 / 3.0)
    expected = (math.log(0.75), entropy, math.log(4.0), -math.log(2.0), math.log(2.0) - entropy)
    for actual, by_hand in zip(out, expected, strict=True):
        torch.testing.assert_close(actual, torch.tensor([by_hand]))


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
            backend=REFERENCE,
        )
        return out.logprobs, out.entropy, out.logsumexp, out.kl

    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda hidden: run(hidden, weight, bias), hidden)
    weight.requires_grad_()
    bias.requires_grad_()
    outputs = slice(3 if reference_moves else 4)
    assert torch.autograd.gradcheck(lambda *t: run(*t)[outputs], (hidden, weight, bias))

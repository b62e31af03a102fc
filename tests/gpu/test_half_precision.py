"""float16 and bfloat16 against float64, forward and every gradient, on each backend."""

import pytest
import torch

from tests.gpu.cases import CASES, HALF, places, require
from tests.numerics import assert_no_worse_than_torch

# The unit in the last place of values near 4, which is how large these outputs get: plain PyTorch
# may happen to round to the nearest where a kernel's other order of summation does not.
ATOL = {torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}


@pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("name", "backend", "device"), places(["lora_linear", "linear_logprob"]))
def test_half_precision(name, backend, device, dtype):
    require(name, backend)
    case = CASES[name](device, dtype)
    try:
        actual = case.run(backend)
    except NotImplementedError as refused:
        assert device == "cpu", refused  # half precision is what a GPU is for
        assert "dtype" in str(refused) or "needs" in str(refused)
        return
    same = case.run("reference")
    exact = case.to_double().run("reference")
    for got, plain, true in zip(actual, same, exact, strict=True):
        assert_no_worse_than_torch(got, plain, true.double(), atol=ATOL[dtype])


@pytest.mark.parametrize(("name", "backend", "device"), places(["lora_linear"]))
def test_float32_adapters_over_a_half_precision_base(name, backend, device):
    """What PEFT trains: the output has the base's dtype, the gradients the adapters'."""
    require(name, backend)
    case = CASES[name](device, torch.bfloat16)
    adapters = ("a0", "a1", "b0", "b1")
    for key in adapters:
        case.inputs[key] = case.inputs[key].detach().float().requires_grad_()
    try:
        y, dx, *grads = case.run(backend)
    except NotImplementedError as refused:
        assert device == "cpu", refused
        return
    assert y.dtype == dx.dtype == torch.bfloat16
    assert {g.dtype for g in grads} == {torch.float32}
    exact = case.to_double().run("reference")
    for got, true in zip((y, dx, *grads), exact, strict=True):
        error = (got.double() - true).norm() / true.norm()
        assert error < 1e-2  # bfloat16 keeps 8 bits; a norm averages over many roundings

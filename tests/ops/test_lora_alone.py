"""The short way of a module's call: the same bits as the long one, and taken by nobody else's."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hydra_kernels.backends import extension
from hydra_kernels.ops.lora_alone import alone
from hydra_kernels.ops.lora_linear import gated_linear
from tests.ops.test_lora_linear import make_layer
from tests.ops.test_lora_linear_kernels import BFLOAT, FLOAT, HALF, KERNELS

pytestmark = pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ extension is not built")


def make(rows, dtype=FLOAT, adapter=FLOAT, bias=True):
    weight, bias, a, b, _ = make_layer(29, 37, (5,), dtype, adapter, bias=bias)
    return torch.randn(*rows, 37).to(dtype), weight, bias, a[0], b[0], 0.5


@pytest.mark.parametrize("rows", [(), (1,), (2, 3), (2, 0), (3, 20), (90,), (400,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (BFLOAT, FLOAT), (HALF, HALF)], ids=str)
def test_the_long_way_s_bits(dtypes, bias, rows):
    x, weight, bias, a, b, scaling = make(rows, *dtypes, bias=bias)
    a.requires_grad_()
    x = x.requires_grad_()
    for grad in (True, False):
        for dropout in (0.0, 0.4):
            with torch.set_grad_enabled(grad):
                torch.manual_seed(3)
                short = alone(x, weight, bias, a, b, scaling, dropout)
                torch.manual_seed(3)
                long = gated_linear(
                    x, weight, bias, [a], [b], [scaling], (0,), None, dropout, num_adapters=1
                )
            assert torch.equal(short, long)
            assert short.dtype == x.dtype and short.requires_grad == grad
            if grad and short.numel():
                upstream = torch.randn_like(short)
                mine = torch.autograd.grad(short, (x, a), upstream)
                for one, two in zip(mine, torch.autograd.grad(long, (x, a), upstream), strict=True):
                    assert torch.equal(one, two)


@pytest.mark.parametrize("change", ["rows", "numbers", "turned", "factors alone"])
def test_strides_do_not_matter(change):
    x, *rest = make((2, 6))
    wide = torch.full((2, 6, 80), torch.nan)
    odd = {
        "rows": wide[..., :37],
        "numbers": wide[..., 2:76:2],
        "turned": torch.empty(37, 6, 2).permute(2, 1, 0),
        "factors alone": torch.empty(2, 6, 37),
    }[change]
    odd.copy_(x)
    weight, bias, a, b, scaling = rest
    turned = [t.t().contiguous().t() for t in (weight, a, b)]
    with torch.no_grad():
        y = alone(odd, turned[0], bias, *turned[1:], scaling, 0.0)
    torch.testing.assert_close(y, F.linear(x, weight, bias) + 0.5 * x @ a.T @ b.T)


class Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", BFLOAT),
    "dispatch mode": Watcher,
    "reference asked for": lambda: pytest.MonkeyPatch.context(),
    "no extension": lambda: pytest.MonkeyPatch.context(),
    "transform": contextlib.nullcontext,
    "float64": contextlib.nullcontext,
    "a tensor for a scale": contextlib.nullcontext,
    "a number that is not a float": contextlib.nullcontext,
    "a bias of a class of its own": contextlib.nullcontext,
    "not on a cpu": contextlib.nullcontext,
}


@pytest.mark.parametrize("case", CONTEXTS)
def test_gives_way(case):
    x, weight, bias, a, b, scaling = make((3,))

    class Own(torch.Tensor):
        pass

    found = []
    with torch.no_grad(), CONTEXTS[case]() as context:
        if case == "reference asked for":
            context.setenv("HYDRA_BACKEND", "reference")
        if case == "no extension":
            context.setattr(extension, "module", None)
        if case == "float64":
            x, weight, bias, a, b = (t.double() for t in (x, weight, bias, a, b))
        if case == "a tensor for a scale":
            scaling = torch.tensor(scaling)
        if case == "a number that is not a float":
            scaling = 2
        if case == "a bias of a class of its own":
            bias = bias.as_subclass(Own)
        if case == "not on a cpu":
            x, weight, a, b, bias = *(t.to("meta") for t in (x, weight, a, b)), None
        if case == "transform":
            torch.func.vmap(
                lambda row: found.append(alone(x, weight, bias, a, b, scaling, 0.0)) or row
            )(x)
        else:
            found.append(alone(x, weight, bias, a, b, scaling, 0.0))
    assert found == [None]
    with torch.no_grad():
        assert alone(*make((3,)), 0.0) is not None

"""lora_linear in every mix of dtypes: what it saves for backward, autocast, float16 to the bit."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F

from hydra_kernels import lora_linear
from tests.numerics import assert_no_worse_than_torch, device_of
from tests.ops.test_lora_linear import make_layer
from tests.ops.test_lora_linear_kernels import (
    BFLOAT,
    FLOAT,
    HALF,
    KERNELS,
    MIXES,
    leaves,
    run,
    runs,
)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("mix", MIXES[:5], ids=lambda m: "-".join(str(d)[6:] for d in m))
def test_little_is_saved_for_backward(backend, dropout, mix):
    """Beside x, which the layer before holds anyway, and parameters."""
    if not runs(backend, *mix):
        pytest.skip(f"{mix} on {backend} needs a GPU")
    m, k, r = (4096, 2048, 16) if backend == "cpu" else (256, 128, 16)
    device = device_of(backend)
    weight, _, a, b, _ = make_layer(8, k, (r,), *mix, device=device)
    x = torch.randn(m, k, device=device).to(mix[0]).requires_grad_()
    inputs = [x, weight, *leaves(*a, *b)]
    saved = saved_bytes(lambda: lora_linear(*inputs, 0.5, dropout=dropout, backend=backend), inputs)
    assert saved <= 0.2 * 2**20 * m / 4096 + 64


def saved_bytes(function, inputs):
    """Of tensors that ``function`` saves for backward, beside its inputs."""
    held = {t.untyped_storage().data_ptr() for t in inputs}
    saved = {}
    kept = []  # so that no two have the same address

    def pack(t):
        storage = t.untyped_storage()
        kept.append(t)
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(saved.values())


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ extension is not built")
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("autocast", [None, BFLOAT, HALF], ids=["plain", "bfloat16", "float16"])
def test_no_dtype_saves_a_copy_of_x(autocast, dropout):
    """The bare layer saves its weight in autocast's dtype, and so does ours."""
    m, k, n = 512, 256, 8
    mode = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    for x_dtype, base, adapter in itertools.product((FLOAT, BFLOAT, HALF), repeat=3):
        if autocast is None and x_dtype != base:
            continue  # which F.linear refuses
        weight, bias, a, b, _ = make_layer(n, k, (16,), base, adapter)
        x = torch.randn(m, k).to(x_dtype).requires_grad_()
        inputs = [x, weight, bias, *leaves(*a, *b)]
        layer = {"bias": bias, "dropout": dropout}
        with mode:
            bare = saved_bytes(lambda: F.linear(*inputs[:3]), inputs)  # noqa: B023
            ours = saved_bytes(
                lambda: lora_linear(*inputs[:2], *inputs[3:], 0.5, **layer),  # noqa: B023
                inputs,
            )
        assert ours - bare <= 0.2 * 2**20 * m / 4096, (x_dtype, base, adapter)


@pytest.mark.parametrize("backend", KERNELS)
def test_under_autocast_gradients_are_the_reference_s(backend):
    """x and the adapters are cast again in backward, and their gradients are in their own dtype."""
    if device_of(backend) == "cpu" and backend != "cpu":
        pytest.skip("Triton's interpreter needs a GPU for bfloat16")
    weight, bias, a, b, scaling = make_layer(40, 24, (5, 3), device=device_of(backend))
    x = torch.randn(60, 24, device=device_of(backend))
    inputs = leaves(x, weight, bias, *a, *b)
    ids = torch.arange(60, device=x.device) % 3 - 1
    upstream = torch.randn(60, 40, device=x.device).bfloat16()

    def outputs(name, dtype, given):
        with torch.autocast(x.device.type, BFLOAT, enabled=dtype is not None):
            y = lora_linear(
                *given[:2], given[3:5], given[5:], scaling, bias=given[2], adapter_ids=ids,
                backend=name,
            )  # fmt: skip
        grads = torch.autograd.grad(y, given, upstream.to(y.dtype))
        assert [g.dtype for g in grads] == [t.dtype for t in given]
        return [y.detach(), *grads]

    actual, same = outputs(backend, BFLOAT, inputs), outputs("reference", BFLOAT, inputs)
    exact = outputs("reference", None, [t.detach().double().requires_grad_() for t in inputs])
    assert actual[0].dtype == BFLOAT
    for mine, torchs, right in zip(actual, same, exact, strict=True):
        ulp = torch.finfo(BFLOAT).eps * right.abs().max().item()
        assert_no_worse_than_torch(mine, torchs, right, atol=2 * ulp)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("rows", [2, 40], ids=["few", "many"])
def test_each_adapter_has_a_dtype_of_its_own(backend, rows):
    if not runs(backend, FLOAT, BFLOAT):
        pytest.skip(f"bfloat16 on {backend} needs a GPU")
    device = device_of(backend)
    weight, bias, a, b, scaling = make_layer(30, 20, (4, 5, 6), device=device)
    for i, dtype in enumerate((FLOAT, BFLOAT, HALF)):
        a[i], b[i] = a[i].to(dtype), b[i].to(dtype)
    x = torch.randn(3, rows, 20, device=device)
    ids = torch.tensor([0, 1, 2], device=device)
    settings = (3, scaling, ids, 0.0, None, torch.randn(3, rows, 30, device=device))
    inputs = [x, weight, bias, *a, *b]
    actual, same = run(inputs, *settings, backend), run(inputs, *settings, "reference")
    exact = run([t.double() for t in inputs], *settings, "reference")
    for mine, torchs, right in zip(actual, same, exact, strict=True):
        assert mine.dtype == torchs.dtype
        ulp = torch.finfo(BFLOAT).eps * right.abs().max().item()
        assert_no_worse_than_torch(mine, torchs, right, atol=2 * ulp)


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ extension is not built")
def test_float16_is_read_and_rounded_as_torch_does():
    """All that are finite, down to the least; a third of one in five needs rounding up."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(HALF)
    x = x[x.isfinite()].unsqueeze(1)
    nothing, one = torch.zeros(1, 1, dtype=HALF), torch.ones(1, 1)
    for scale in (1.0, 1 / 3, 3.0, 0.001):  # 3: past the largest, to infinity
        y = lora_linear(x, nothing, one, one, scale, backend="cpu")
        assert torch.equal(y, (x.float() * scale).half())

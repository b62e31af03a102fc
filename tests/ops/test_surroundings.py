"""What surrounds a call of an op and is no argument of it: torch's defaults, watchers, subclasses.

Kernels are given addresses. Where one is not that of a float32 on this device, nobody objects.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import hydra_kernels
from hydra_kernels.backends import lora_plan
from hydra_kernels.backends.cpu import linear_logprob
from tests.gpu.cases import CASES, places


class Shell(torch.Tensor):
    """A wrapper of another tensor, without memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        def inner(t):
            return t.inner if isinstance(t, cls) else t

        out = op(*tree_map(inner, args), **tree_map(inner, kwargs or {}))
        return tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, out)


HERE = [place for place in places() if not place.marks]


@pytest.mark.parametrize(("name", "backend", "device"), HERE)
def test_default_device_and_dtype_do_not_matter(name, backend, device):
    case = CASES[name](device)
    expected = case.run(backend)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64):  # smaller and larger than what kernels write
            torch.set_default_dtype(dtype)
            linear_logprob._sizes.cache_clear()  # made with tensors of its own
            with torch.device("meta"):  # as any device but that of the tensors
                found = case.run(backend)
            for a, b in zip(found, expected, strict=True):
                assert a.device == b.device and a.dtype == b.dtype
                assert torch.equal(a, b)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(("name", "backend", "device"), HERE)
def test_a_fake_call_tells_what_a_real_one_gives(name, backend, device):
    """Kernels never see a fake tensor, which has no memory, and keep none of them for later."""
    case = CASES[name](device)
    expected = case.run(backend)
    lora_plan._columns.cache_clear()
    with FakeTensorMode() as mode:
        # As a caller has them: each made under the mode.
        fake = {key: mode.from_tensor(t) for key, t in case.inputs.items()}
        found = dataclasses.replace(case, inputs=fake).run(backend)
    for a, b in zip(found, expected, strict=True):
        assert isinstance(a, FakeTensor)
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        if b.is_contiguous():
            assert a.stride() == b.stride()
    for a, b in zip(case.run(backend), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "backend", "device"), HERE)
def test_a_trace_runs_the_kernel_again(name, backend, device):
    """make_fx records what the dispatcher sees; a kernel beside it would be missing in there."""
    case = CASES[name](device)
    keys = list(case.inputs)

    def call(*tensors):
        return case.call(dict(zip(keys, tensors, strict=True)), backend)

    with torch.no_grad():
        traced = make_fx(call)(*case.inputs.values())
        case.change()
        expected = call(*case.inputs.values())
        for a, b in zip(traced(*case.inputs.values()), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "backend", "device"), HERE)
def test_tensors_that_are_not_memory_are_the_references(name, backend, device):
    """One such as DTensor is a shell: at its address there is nothing."""
    case = CASES[name](device)
    if case.differentiable:
        key = case.differentiable[0]
        case = dataclasses.replace(case, differentiable=())
    else:
        key = next(iter(case.inputs))
    plain = case.run("reference")
    wrapped = {**case.inputs, key: Shell(case.inputs[key].detach())}
    call = dataclasses.replace(case, inputs=wrapped)
    for a, b in zip(call.run(None), plain, strict=True):
        assert torch.equal(a.inner if isinstance(a, Shell) else a, b)
    if backend != "reference":
        with pytest.raises(NotImplementedError, match="kernels take no Shell"):
            call.run(backend)


def test_a_transform_after_an_ordinary_call():
    """The choice that a CPU's calls remember is not that of a transform."""
    x, weight, a, b = (torch.randn(*size) for size in ((20, 16), (12, 16), (4, 16), (12, 4)))

    def loss(x):
        one = hydra_kernels.lora_linear(x, weight, a, b, 2.0).square().sum()
        projection = hydra_kernels.Projection(weight, a, b, 2.0)
        return one + hydra_kernels.lora_linear_group(x, [projection, projection])[1].sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected, rtol=1e-4, atol=1e-4)
    rows = torch.stack([loss(row) for row in x.unsqueeze(1)])
    torch.testing.assert_close(torch.vmap(loss)(x.unsqueeze(1)), rows, rtol=1e-4, atol=1e-4)


def test_selective_checkpointing_sees_the_op():
    x, weight, a, b = (torch.randn(*size) for size in ((20, 16), (12, 16), (4, 16), (12, 4)))
    seen = []

    def policy(context, op, *args, **kwargs):
        seen.append(op)
        return CheckpointPolicy.PREFER_RECOMPUTE

    def call(x):
        return hydra_kernels.lora_linear(x, weight, a, b, 2.0).tanh()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(leaf).sum(), leaf)
    context = functools.partial(create_selective_checkpoint_contexts, policy)
    y = checkpoint(call, leaf, use_reentrant=False, context_fn=context)
    assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], expected)
    assert torch.ops.hydra.lora_linear_fwd.default in seen


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_torchscript_trace_reads_its_inputs(name):
    """It would take what a kernel wrote for an empty tensor, or for a constant."""
    case = CASES[name]("cpu")
    keys = list(case.inputs)

    def call(*tensors):
        return case.call(dict(zip(keys, tensors, strict=True)), None)

    with torch.no_grad():
        call(*case.inputs.values())  # after which lora_linear remembers its choice
        traced = torch.jit.trace(call, tuple(case.inputs.values()), check_trace=False)
        case.change()
        found, expected = traced(*case.inputs.values()), call(*case.inputs.values())
    for a, b in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "backend", "device"), [p for p in HERE if CASES[p.values[0]]("cpu").differentiable]
)
def test_many_upstream_gradients_at_once(name, backend, device):
    """As torch.autograd.functional.jacobian(vectorize=True) has them: none has an address."""
    case = CASES[name](device)
    leaves = [case.inputs[key] for key in case.differentiable]
    outputs = [t for t in case.call(case.inputs, backend) if t.requires_grad]
    upstream = [torch.randn(3, *t.shape, device=device).to(t.dtype) for t in outputs]
    many = torch.autograd.grad(outputs, leaves, upstream, is_grads_batched=True)
    for i in range(3):
        outputs = [t for t in case.call(case.inputs, backend) if t.requires_grad]
        one = torch.autograd.grad(outputs, leaves, [each[i] for each in upstream])
        for a, b in zip(many, one, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-4)
    if backend != "reference":  # and no constant, where they are to be differentiated again
        outputs = [t for t in case.call(case.inputs, backend) if t.requires_grad]
        with pytest.raises(RuntimeError, match="no derivative of its own"):
            torch.autograd.grad(outputs, leaves, upstream, is_grads_batched=True, create_graph=True)


@pytest.mark.parametrize("name", CASES)
def test_eager_calls_compile_nothing_anew(name):
    """What they remember of their arguments is no guard of compiled code."""
    case, longer = CASES[name]("cpu"), CASES[name]("cpu")
    torch.compiler.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="eager")
    expected = compiled(case.inputs, None)
    longer.inputs = {  # other sizes, which fit each other
        key: t if key == "seed" else t.repeat((2,) * t.dim()) for key, t in longer.inputs.items()
    }
    longer.call(longer.inputs, None)
    with torch.compiler.set_stance("fail_on_recompile"):
        for a, b in zip(compiled(case.inputs, None), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
def test_meta_tensors_tell_sizes(name):
    case = CASES[name]("cpu")
    inputs = {key: t.detach().to("meta") for key, t in case.inputs.items()}
    for a, b in zip(case.call(inputs, None), case.call(case.inputs, None), strict=True):
        assert (a.device.type, a.shape, a.dtype) == ("meta", b.shape, b.dtype)

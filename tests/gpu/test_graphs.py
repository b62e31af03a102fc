"""A captured CUDA graph obeys new adapter ids, seeds and temperatures at replay.

On a CPU, where nothing is captured, the same bodies run with a plain call in place of the replay:
they show that the cases do change, and that the comparison can fail.
"""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.measure import graphed
from hydra_kernels import lora_linear
from tests.gpu.cases import CASES, places, require


def replayable(call, device):
    """``call``, captured where there is a GPU; each replay returns copies of its outputs."""
    replay = graphed(call) if device == "cuda" else call

    def again():
        return [t.clone() for t in replay()]

    return again


@pytest.mark.parametrize(("name", "backend", "device"), places())
def test_replay_sees_new_values(name, backend, device):
    require(name, backend)
    case = CASES[name](device)
    replay = replayable(lambda: case.run(backend), device)
    before = replay()
    for changed in [*case.changes, None]:
        case.change(*([changed] if changed else []))
        after = replay()
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), changed
        # 1e-5: cuBLAS may choose another split of a sum while it is captured.
        torch.testing.assert_close(after, list(case.run(backend)), rtol=1e-5, atol=1e-5)
        before = after


@pytest.mark.parametrize(("name", "backend", "device"), places())
def test_replays_are_alike(name, backend, device):
    require(name, backend)
    case = CASES[name](device)
    replay = replayable(lambda: case.run(backend), device)
    first = replay()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, replay(), strict=True))


@pytest.mark.parametrize(("name", "backend", "device"), places(["lora_linear"]))
def test_one_graph_serves_every_role(name, backend, device):
    """Actor, critic, all off: each equal to a call with that adapter alone."""
    require(name, backend)
    case = CASES[name](device)
    t = case.inputs
    replay = replayable(lambda: case.run(backend), device)
    for role in (0, 1, -1, 0):
        t["ids"].fill_(role)
        y, dx, *_ = replay()
        base = F.linear(t["x"], t["weight"], t["bias"])
        expected = base
        if role >= 0:
            s = (0.5, 2.0)[role] * (t["x"] @ t[f"a{role}"].T)
            expected = base + s @ t[f"b{role}"].T
        torch.testing.assert_close(y, expected.detach(), rtol=1e-4, atol=1e-4)
        upstream = torch.full_like(base, base.numel() ** -0.5)
        (dx_expected,) = torch.autograd.grad(expected, t["x"], upstream)
        torch.testing.assert_close(dx, dx_expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "backend", "device"), places(["lora_linear"]))
def test_dropout_without_a_seed_changes_at_every_replay(name, backend, device):
    require(name, backend)
    t = CASES[name](device).inputs

    def call():
        y = lora_linear(t["x"], t["weight"], t["a0"], t["b0"], 1.0, dropout=0.5, backend=backend)
        # The mask of the forward is that of the backward: x's gradient has its zeros.
        return y.detach(), *torch.autograd.grad(y.float().sum(), [t["x"]])

    replay = replayable(call, device)
    (y0, dx0), (y1, dx1) = replay(), replay()
    assert not torch.equal(y0, y1) and not torch.equal(dx0, dx1)


@pytest.mark.parametrize(("name", "backend", "device"), places(["linear_logprob"]))
def test_temperature_is_read_at_replay(name, backend, device):
    require(name, backend)
    case = CASES[name](device)
    replay = replayable(lambda: case.run(backend), device)
    for temperature in (0.5, 1.0, 4.0):
        case.inputs["temperature"].fill_(temperature)
        logprobs = replay()[0]
        z = case.inputs["hidden"].double() @ case.inputs["weight"].double().T / temperature
        targets = case.inputs["targets"]
        kept = targets >= 0
        exact = z.log_softmax(-1)[kept, targets[kept]]
        torch.testing.assert_close(logprobs[kept].double(), exact, rtol=1e-4, atol=1e-4)
        assert not logprobs[~kept].any()

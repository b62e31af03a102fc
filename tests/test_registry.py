import logging
import os
import subprocess
import sys

import pytest
import torch

from hydra_kernels import available_backends, ppo_loss
from hydra_kernels.backends import registry


def inputs(dtype=torch.float32):
    x = torch.zeros(2, 3, dtype=dtype)
    return dict(
        logprobs=x,
        values=x,
        old_logprobs=x,
        old_values=x,
        advantages=x,
        returns=x,
        mask=torch.ones(2, 3, dtype=torch.bool),
    )


@pytest.fixture
def toy(monkeypatch):
    """An op of its own: "cpu" runs float32, "cuda" is written but missing from this install."""
    monkeypatch.setattr(registry, "_KERNELS", {})
    monkeypatch.setattr(registry, "_ORDER", {})
    registry._say_once.cache_clear()

    def float32_only(*tensors):
        return registry.wrong_dtype((torch.float32,), *tensors)

    registry.register("toy", "cpu", registry.Kernel(abs, None, float32_only))
    registry.register(
        "toy", "cuda", registry.Kernel(abs, None, float32_only, missing=lambda: ["no driver"])
    )
    return "toy"


def test_unasked_the_first_that_can_run(toy):
    assert registry.select(toy, None, torch.zeros(1)) == "cpu"
    assert registry.select(toy, None, torch.zeros(1, dtype=torch.float64)) == "reference"
    assert registry.runnable(toy, torch.zeros(1)) == ("cpu", "reference")
    assert registry.runnable(toy, torch.zeros(1, dtype=torch.float64)) == ("reference",)


def test_order_of_an_op(toy):
    registry.prefer(toy, ("reference", "cpu", "triton", "cuda"))
    assert registry.select(toy, None, torch.zeros(1)) == "reference"
    with pytest.raises(ValueError, match="must name each of cuda, cpu, triton, reference once"):
        registry.prefer(toy, ("cpu",))


def test_the_choice_follows_what_changes_after_the_first_call(toy, monkeypatch):
    """What was found at the first call is kept, until an order, a reason or a kernel is new."""
    monkeypatch.setattr(registry, "_UNAVAILABLE", {})
    x = torch.zeros(1)
    assert registry.select(toy, None, x) == "cpu"
    registry.prefer(toy, ("reference", "cpu", "triton", "cuda"))
    assert registry.select(toy, None, x) == "reference"
    registry.prefer(toy, registry.PRIORITY)
    assert registry.select(toy, None, x) == "cpu"
    registry.unavailable("cpu", "it is broken")
    assert registry.select(toy, None, x) == "reference"
    assert registry.available_backends(toy).why_not["cpu"] == "it is broken"
    with pytest.raises(NotImplementedError, match="it is broken"):
        registry.select(toy, "cpu", x)
    registry.register(toy, "triton", registry.Kernel(abs, None, lambda *tensors: []))
    assert registry.select(toy, None, x) == "triton"


def test_a_refusal_of_these_tensors_is_said_too(toy, caplog):
    with caplog.at_level(logging.INFO, logger="hydra_kernels"):
        registry.select(toy, None, torch.zeros(1, dtype=torch.float64))
    assert "toy: passed over cpu: needs torch.float32, got torch.float64" in caplog.text


def test_asked_by_name_it_runs_or_gives_every_reason(toy):
    assert registry.select(toy, "cpu", torch.zeros(1)) == "cpu"
    message = r"toy: backend 'cpu' cannot run \(2,\) torch.float64 on cpu: needs torch.float32"
    with pytest.raises(NotImplementedError, match=message):
        registry.select(toy, "cpu", torch.zeros(2, dtype=torch.float64), None)
    with pytest.raises(NotImplementedError, match="no driver"):
        registry.select(toy, "cuda", torch.zeros(1))
    with pytest.raises(NotImplementedError, match="not written for this op .written: cuda, cpu"):
        registry.select(toy, "triton", torch.zeros(1))


def test_environment_chooses_for_the_whole_process(toy, monkeypatch):
    monkeypatch.setenv("HYDRA_BACKEND", "reference")
    assert registry.select(toy, None, torch.zeros(1)) == "reference"
    assert registry.select(toy, "cpu", torch.zeros(1)) == "cpu"  # the argument is nearer
    monkeypatch.setenv("HYDRA_BACKEND", "cuda")
    with pytest.raises(NotImplementedError, match="no driver"):
        registry.select(toy, None, torch.zeros(1))
    monkeypatch.setenv("HYDRA_BACKEND", "")
    assert registry.select(toy, None, torch.zeros(1)) == "cpu"
    monkeypatch.setattr(registry, "_environ", {})  # an os.environ without the shortcut
    assert registry.select(toy, None, torch.zeros(1)) == "cpu"
    monkeypatch.setenv("HYDRA_BACKEND", "reference")
    assert registry.select(toy, None, torch.zeros(1)) == "reference"


def test_one_tensor_elsewhere_is_enough():
    x = torch.zeros(1)
    for tensors in ((x, None, x.to("meta")), (x.to("meta"), x)):
        assert registry.wrong_device("cpu", *tensors) == ["needs tensors on cpu, got meta"]
    assert registry.wrong_device("cpu", x, None) == []


def test_falling_back_is_said_once(toy, caplog):
    with caplog.at_level(logging.INFO, logger="hydra_kernels"):
        for _ in range(3):
            registry.select(toy, None, torch.zeros(1))
    assert [r.getMessage() for r in caplog.records] == ["toy: passed over cuda: no driver"]


def test_registering_twice_or_nowhere(toy):
    again = registry.Kernel(abs, None, lambda *t: [])
    with pytest.raises(ValueError, match="toy already has a kernel for backend 'cpu'"):
        registry.register(toy, "cpu", again)
    with pytest.raises(ValueError, match="no such backend 'tpu'"):
        registry.register(toy, "tpu", again)


def test_available_backends():
    found = available_backends("ppo_loss")
    assert "reference" in found and found[-1] == "reference"
    assert set(found) | set(found.why_not) == {"cuda", "cpu", "triton", "reference"}
    assert all(found.why_not.values())
    for name, why in found.why_not.items():
        assert f"; not {name}: {why}" in repr(found)
    if not torch.cuda.is_available():
        assert "cuda" not in found and "CUDA" in found.why_not["cuda"]
    everything = available_backends()
    assert everything["ppo_loss"] == found
    ops = {"lora_linear", "linear_logprob", "ppo_loss", "kl_rewards", "gae", "masked_whiten"}
    assert ops <= set(everything)
    with pytest.raises(ValueError, match="no such op 'softmax' .known: .*ppo_loss"):
        available_backends("softmax")


def test_all_backends_are_shown_as_a_table():
    """A reason that several ops share stands there once, whoever asks."""
    no_gpu, rest = "torch sees no GPU", {"cuda": "built without CUDA"}
    table = registry.AllBackends(
        gae=registry.Backends(["cpu", "reference"], {**rest, "triton": no_gpu}),
        ppo_loss=registry.Backends(["reference"], {**rest, "cpu": "not loaded", "triton": no_gpu}),
    )
    assert repr(table).splitlines() == [
        "gae       cpu, reference",
        "ppo_loss  reference",
        "not cuda: built without CUDA",
        "not triton: torch sees no GPU",
        "not cpu for ppo_loss: not loaded",
    ]
    assert str(registry.AllBackends()) == ""
    assert isinstance(available_backends(), dict)


def test_every_listed_backend_runs():
    for backend in available_backends("ppo_loss"):
        if backend != "cuda":
            assert ppo_loss(**inputs(), backend=backend).loss == 0


def test_without_triton_the_reason_is_that():
    """The packages import and run where triton is not installed."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import hydra_kernels\n"
        "print(hydra_kernels.available_backends('ppo_loss').why_not['triton'])\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}
    )
    assert out.returncode == 0, out.stderr
    assert "triton is not installed" in out.stdout


def test_triton_is_imported_only_for_a_torch_that_may_have_a_gpu():
    code = (
        "import sys, torch, hydra_kernels\n"
        "assert ('triton' in sys.modules) == (torch.version.cuda is not None), sys.modules.keys()\n"
        "print(hydra_kernels.available_backends('gae').why_not.get('triton', 'GPU'))\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr
    assert "GPU" in out.stdout


def test_under_a_transform_the_reference_runs(toy, caplog):
    """torch.func's tensors have no memory: a kernel cannot read them, the reference need not."""
    chosen = []

    def call(x, backend=None):
        chosen.append(registry.select(toy, backend, x))
        return x

    with caplog.at_level(logging.INFO, "hydra_kernels"):
        torch.vmap(call)(torch.zeros(2, 3))
    assert chosen == ["reference"]
    assert "toy: passed over cpu: torch.func's transforms" in caplog.text
    torch.vmap(lambda x: call(x, "reference"))(torch.zeros(2, 3))
    with pytest.raises(NotImplementedError, match="'cpu' cannot run under a transform: torch.func"):
        torch.vmap(lambda x: call(x, "cpu"))(torch.zeros(2, 3))
    with pytest.raises(NotImplementedError, match="transform: no such backend"):
        torch.vmap(lambda x: call(x, "nope"))(torch.zeros(2, 3))


def test_transforms_of_an_op_agree_with_a_loop():
    x = inputs()
    rows = torch.randn(4, 2, 3)

    def loss(logprobs):
        return ppo_loss(**{**x, "logprobs": logprobs, "advantages": x["mask"].float()}).loss

    expected = []
    for row in rows.clone().requires_grad_():
        expected += torch.autograd.grad(loss(row), row)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(rows), torch.stack(expected))

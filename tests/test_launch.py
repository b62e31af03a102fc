"""What every launch on a GPU takes, on a machine that need not have one: CUDA is faked."""

import contextlib
import functools
import os
import threading

import pytest
import torch

from hydra_kernels.backends import launch, lora_plan
from hydra_kernels.backends.cuda import device as cuda_device
from hydra_kernels.backends.cuda import lora_linear as decode
from hydra_kernels.ops.lora_arguments import draw_seed


class On:
    """As much of a tensor on a GPU as ``on_device`` looks at."""

    def __init__(self, index):
        self.device = torch.device("cuda", index)


class OnGPU:
    """A tensor of the meta device that says it is on a GPU."""

    def __init__(self, tensor):
        self._tensor, self.device = tensor, torch.device("cuda", 0)

    def __getattr__(self, name):
        return getattr(self._tensor, name)


@pytest.fixture
def cuda(monkeypatch):
    """Two devices of which the first is current, streams by number, and no capture."""
    state = {"stream": 1, "capturing": False, "made": []}

    class Stream:
        def __init__(self, device):
            self.cuda_stream = (device.index, state["stream"])

        def synchronize(self):
            state["made"].append("waited")

    def on_the_cpu(real):
        def make(*size, dtype, device):
            at = threading.get_ident(), torch.is_inference_mode_enabled(), state.get("entered")
            state["made"].append(at)
            return real(*size, dtype=dtype, device="cpu")

        return make

    @contextlib.contextmanager
    def entered(stream):
        state["entered"] = stream.cuda_stream
        yield
        del state["entered"]

    for name in ("_tickets", "_constants", "_captured"):
        monkeypatch.setattr(launch, name, {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch, "zeros", on_the_cpu(torch.zeros))
    monkeypatch.setattr(torch, "empty", on_the_cpu(torch.empty))
    return state


def test_the_device_is_changed_where_it_is_another(cuda):
    guard = launch.on_device(On(1))
    assert isinstance(guard, torch.cuda.device) and guard.idx == 1
    for there_already in (On(0), torch.ones(1)):
        assert isinstance(launch.on_device(there_already), contextlib.nullcontext)


def test_a_ticket_is_zero_and_of_one_stream(cuda):
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    ticket = launch.ticket(first)
    assert (ticket.tolist(), ticket.dtype) == ([0], torch.int32)
    assert launch.ticket(first) is ticket
    assert launch.ticket(second) is not ticket
    cuda["stream"] = 2
    assert launch.ticket(first) is not ticket
    cuda["stream"] = 1
    assert launch.ticket(first) is ticket


def test_a_captured_graph_has_tickets_of_its_own(cuda):
    """It may be replayed beside what runs on the stream it was captured on, or another graph."""
    device = torch.device("cuda", 0)
    shared = launch.ticket(device)
    cuda["capturing"] = True
    captured = [launch.ticket(device) for _ in range(2)]
    assert captured[0] is not captured[1]
    assert all(ticket is not shared for ticket in captured)
    cuda["capturing"] = False
    assert launch.ticket(device) is shared


def test_on_a_cpu_every_ticket_is_new():
    device = torch.device("cpu")
    assert launch.ticket(device) is not launch.ticket(device)


@pytest.mark.parametrize(
    ("archs", "runs", "not_on"),
    [
        # machine code of its own generation, PTX for all that come later
        ("80,90a", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 0), (7, 5)]),
        ("90a", [(9, 0)], [(8, 0), (8, 9), (10, 0)]),  # of exactly one, without PTX
        ("86", [(8, 6), (8, 9), (9, 0)], [(8, 0), (7, 5)]),
    ],
)
def test_gpus_that_a_build_covers(archs, runs, not_on):
    assert all(cuda_device.runs_as(archs, *capability) for capability in runs)
    assert not any(cuda_device.runs_as(archs, *capability) for capability in not_on)


@pytest.mark.parametrize(
    ("archs", "capability", "arch"),
    [
        ("75", (7, 5), 75),
        ("75", (9, 0), 75),  # its PTX, without what came later
        ("75,80", (8, 6), 80),
        ("75,90a", (8, 0), 75),
        ("80,90a", (9, 0), 90),
        ("80,90a", (12, 0), 80),
        ("80", (7, 5), 0),
    ],
)
def test_code_for_older_gpus_has_no_matrix_products(archs, capability, arch, monkeypatch):
    assert cuda_device.runs_as(archs, *capability) == arch
    monkeypatch.setitem(cuda_device.extension.build_info, "cuda_archs", archs)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    caches = cuda_device._architecture, cuda_device._too_different
    for cache in caches:
        cache.cache_clear()
    tensors = [torch.empty(n, 64, dtype=torch.float16, device="meta") for n in (4, 32, 8)]
    x, weight, a = (OnGPU(t) for t in tensors)
    b = OnGPU(torch.empty(32, 8, dtype=torch.float16, device="meta"))
    try:
        with torch.no_grad():
            reasons = decode.unsupported(x, None, None, weight, None, a, b)
    finally:
        for cache in caches:
            cache.cache_clear()
    assert any("8.0 or newer" in reason for reason in reasons) == (arch == 75)
    assert bool(reasons) == (arch < 80)


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 6), False)])
def test_a_gpu_that_is_too_old_is_a_reason(capability, refused, monkeypatch):
    """Not an error of the first launch: unasked, the reference runs instead."""
    runtime = pytest.importorskip("hydra_kernels.backends.triton.runtime")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(cuda_device.extension.build_info, "cuda_archs", "80,90a")
    for cache in (cuda_device._too_different, runtime._too_old):
        cache.cache_clear()
    tensors = (None, On(0), On(0))
    try:
        found = cuda_device.wrong_device(*tensors), runtime.wrong_device(*tensors)
    finally:
        for cache in (cuda_device._too_different, runtime._too_old):
            cache.cache_clear()
    assert [bool(reasons) for reasons in found] == [refused] * 2
    if refused:
        assert "was built for sm_80, sm_90a, got a GPU of sm_75" in found[0][0]


def test_what_is_kept_is_made_outside_of_the_thread_s_pool_and_modes(cuda):
    """torch.compile's CUDA graphs warm up in a pool, and refuse one that something is left in."""
    cuda["stream"] = 5
    with torch.inference_mode():
        ticket = launch.ticket(torch.device("cuda", 1))
    ((thread, inference, stream),) = cuda["made"]
    assert thread != threading.get_ident() and not inference and stream == (1, 5)
    assert not ticket.is_inference()
    with pytest.raises(ZeroDivisionError):
        launch.lasting(torch.device("cuda", 0), lambda: 1 // 0)


KEY = lora_plan.Plan((2,), (0, 1), (2.0, 0.5), 2, 0.0), (2, 1), torch.float32


def test_a_plan_s_columns_are_made_once_and_done_before_another_stream_reads_them(cuda):
    device = torch.device("cuda", 0)
    owner, scale = lora_plan.columns(*KEY, device)
    assert owner.tolist() == [0, 0, 1] and scale.tolist() == [2.0, 2.0, 0.5]
    assert cuda["made"][-1] == "waited"
    assert lora_plan.columns(*KEY, device)[0] is owner and len(cuda["made"]) == 3
    assert lora_plan.columns(*KEY, torch.device("cuda", 1))[0] is not owner


def test_a_captured_graph_keeps_what_the_cache_forgets(cuda):
    """The owners and scales of a plan: a graph holds their address alone."""
    device = torch.device("cuda", 0)
    known = lora_plan.columns(*KEY, device)
    assert not launch._captured
    cuda["capturing"] = True
    assert lora_plan.columns(*KEY, device) is known
    assert list(launch._captured.values()) == [known]
    lora_plan.columns(*KEY, torch.device("cpu"))
    assert len(launch._captured) == 1


def test_a_captured_graph_fills_what_nobody_has_made_before(cuda):
    """In its own memory, which nobody else may be given, and without a wait."""
    device = torch.device("cuda", 0)
    cuda["capturing"] = True
    found = [lora_plan.columns(*KEY, device) for _ in range(2)]
    assert found[0][0] is not found[1][0] and found[0][0].tolist() == [0, 0, 1]
    assert "waited" not in cuda["made"] and not launch._constants and not launch._captured


@pytest.mark.parametrize("values", [[], [3], [1, 1, 2, 2, 2, 1], [0.5, -1.0, -1.0]])
def test_a_table_is_filled_on_its_device(cuda, values, monkeypatch):
    dtype = torch.float32 if 0.5 in values else torch.int64
    here = launch.table(values, dtype, torch.device("cpu"))
    assert here.tolist() == values and here.dtype == dtype
    monkeypatch.setattr(torch, "tensor", None)  # whose copy from the host waits
    there = launch.table(values, dtype, torch.device("cuda", 0))
    assert there.tolist() == values and there.dtype == dtype


def test_an_int_for_a_seed_is_written_by_the_device(cuda, monkeypatch):
    monkeypatch.setattr(torch, "tensor", None)  # whose copy from the host waits
    seed = draw_seed(2**62 + 1, torch.device("cuda", 0))
    assert seed.tolist() == [2**62 + 1, 0] and seed.dtype == torch.int64


def test_what_a_gpu_is_asked_is_a_constant_to_compilers(monkeypatch):
    """Its answer is cached, and made by what no compiler traces."""
    runtime = pytest.importorskip("hydra_kernels.backends.triton.runtime")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (99, 0))
    monkeypatch.setitem(cuda_device.extension.build_info, "cuda_archs", "80")
    monkeypatch.setattr(runtime, "_too_old", functools.cache(lambda device: os.getpid() < 0))

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x):
        if runtime.too_old(x.device) or cuda_device.too_different(x.device):
            return x
        return x + 1

    try:
        assert torch.equal(chosen(torch.ones(2)), torch.full((2,), 2.0))
    finally:
        cuda_device._too_different.cache_clear()

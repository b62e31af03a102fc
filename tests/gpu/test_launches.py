"""Kernels run on the current stream and on their tensors' device, and say when a launch fails."""

import pytest
import torch

from tests.gpu.cases import CASES, places, require

BUSY = 400_000_000  # cycles of the device, about 0.2 s


def on_gpu():
    return [p for p in places() if p.values[2] == "cuda"]


@pytest.mark.parametrize(("name", "backend", "device"), on_gpu())
def test_runs_on_the_current_stream(name, backend, device):
    """A busy default stream holds nothing up that was launched on another."""
    require(name, backend)
    case = CASES[name](device)
    expected = case.run(backend)  # compiled and warmed up
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        case.run(backend)  # cuBLAS makes its workspace for this stream here
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY)
    busy = torch.cuda.Event()
    busy.record()
    with torch.cuda.stream(side):
        out = case.run(backend)
        side.synchronize()
        assert not busy.query(), "the call waited for the default stream, or ran on it"
    torch.cuda.synchronize()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "backend", "device"), on_gpu())
def test_waits_for_what_its_own_stream_writes(name, backend, device):
    """Inputs that are still being written on the current stream are read after that."""
    require(name, backend)
    case = CASES[name](device)
    case.run(backend)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(BUSY // 10)
        case.change()
        out = case.run(backend)
        side.synchronize()
    torch.testing.assert_close(out, case.run(backend), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "backend", "device"), on_gpu())
def test_never_synchronises(name, backend, device):
    """The host is back long before the device is done with what was queued before the call."""
    require(name, backend)
    case = CASES[name](device)
    for _ in range(2):
        case.run(backend)
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY)
    queued = torch.cuda.Event()
    queued.record()
    case.run(backend)
    assert not queued.query(), "the call waited for the device"
    torch.cuda.synchronize()


@pytest.mark.parametrize(("name", "backend", "device"), on_gpu())
def test_runs_where_its_tensors_are(name, backend, device):
    require(name, backend)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a machine with two GPUs: one current, one with the tensors")
    case = CASES[name]("cuda:1")
    with torch.cuda.device(0):
        out = case.run(backend)
    with torch.cuda.device(1):
        expected = case.run(backend)
    assert all(t.device == torch.device("cuda", 1) for t in out)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

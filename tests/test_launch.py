"""What every launch on a GPU takes, on a machine that need not have one: CUDA is faked."""

import contextlib

import pytest
import torch

from hydra_kernels.backends import launch


class On:
    """As much of a tensor on a GPU as ``on_device`` looks at."""

    def __init__(self, index):
        self.device = torch.device("cuda", index)


@pytest.fixture
def cuda(monkeypatch):
    """Two devices of which the first is current, streams by number, and no capture."""
    state = {"stream": 1, "capturing": False}

    class Stream:
        def __init__(self, device):
            self.cuda_stream = (device.index, state["stream"])

    def zeros(*size, dtype, device):
        return real(*size, dtype=dtype, device="cpu")

    real = torch.zeros
    monkeypatch.setattr(launch, "_tickets", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch, "zeros", zeros)
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

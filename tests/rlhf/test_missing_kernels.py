"""An install whose C++ kernels were left out says so once a command, and runs."""

import pytest

import hydra_kernels
from hydra_kernels.backends.registry import Backends
from hydra_rlhf.commands.inputs import choose_backend


@pytest.mark.parametrize("names", [("reference",), ("cpu", "reference"), ("triton", "reference")])
def test_only_the_reference_is_worth_a_warning(names, monkeypatch, caplog):
    monkeypatch.delenv("HYDRA_BACKEND", raising=False)
    found = Backends(names, {"cpu": "no C++ compiler when it was installed"})
    monkeypatch.setattr(hydra_kernels, "available_backends", lambda op: found)
    choose_backend("auto")
    expected = ["slower and takes more memory: no C++ compiler when it was installed"]
    told = [message.split("which is ")[1] for message in caplog.messages]
    assert told == (expected if names == ("reference",) else [])

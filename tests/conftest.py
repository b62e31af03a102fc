import importlib.util
import logging
import os
import signal

import pytest
import torch

from tests import no_hypothesis
from tests.lost_device import LostDevice

if importlib.util.find_spec("hypothesis") is None:
    no_hypothesis.install()

# A shell starts its background jobs with SIGINT ignored, and so would be every process from here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Without a GPU the Triton kernels run in its interpreter, which reads this at import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    if torch.cuda.is_available():
        lost_device = LostDevice(torch.cuda.synchronize, hasattr(config, "workerinput"))
        config.pluginmanager.register(lost_device)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    for item in items:
        if torch.cuda.is_available():
            if runs_on_a_gpu(item):
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):  # not `in keywords`: tests/gpu is one too
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none"))


def runs_on_a_gpu(item: pytest.Item) -> bool:
    """Whether a test that a GPU is not asked of runs there if there is one: elsewhere it runs
    through Triton's interpreter or not at all."""
    if "cuda_on_cpu" in item.path.parts:
        return False  # the kernels that are called "cuda" there run on the CPU everywhere
    params = item.callspec.params if hasattr(item, "callspec") else {}
    asked = params.get("backend") in ("cuda", "triton")
    return asked or getattr(item.module, "DEVICE", None) == "cuda"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _gradients_stay_on():
    """A test that leaves them off fails, and not those that come after it."""
    yield
    left_on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert left_on, "the test left gradients switched off"


@pytest.fixture(autouse=True)
def _logger_levels():
    """What a test silences (the fuzzer, a benchmark) speaks again in the next one's caplog."""
    loggers = [logging.getLogger(name) for name in ("hydra_kernels", "hydra_rlhf")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    """torch.empty returns NaN here, so that a kernel that leaves an output unwritten fails."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill

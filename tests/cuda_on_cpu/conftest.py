import os

import pytest

from tests.cuda_on_cpu import build, device

# Seconds each: CUDA_ON_CPU=all, as make cuda-on-cpu sets it, runs them too. What only they reach,
# several tiles of rows and blocks of the vocabulary, test_schedules.py has at a size of its own.
LONG = (
    "M1100-",
    "-1100-",
    "test_vocabularies__linear_logprob[cuda-50257]",
    "test_vocabularies__linear_logprob[cuda-129920]",
    "test_vocabularies__linear_logprob[cuda-151936]",
    "test_bounds__linear_logprob",
    "test_repeats_bit_for_bit__masked_whiten",
    "test_repeats_bit_for_bit__linear_logprob",
)
# On a CPU it asserts what is so of a CPU: a GPU's cache holds all of its logits.
OF_A_CPU = ("test_never_holds_the_logits__linear_logprob",)


def pytest_collection_modifyitems(config, items):
    left_out = OF_A_CPU if os.environ.get("CUDA_ON_CPU") == "all" else OF_A_CPU + LONG
    out = [i for i in items if "cuda_on_cpu" in i.nodeid and any(n in i.nodeid for n in left_out)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


@pytest.fixture(scope="session")
def emulated_kernels():
    if build.missing():
        pytest.skip(f"the kernels are compiled for the CPU here: {build.missing()}")
    return device.kernels()


@pytest.fixture
def cuda_on_cpu(emulated_kernels):
    """Backend "cuda" runs on tensors of the CPU, its threads and blocks in a random order."""
    with device.installed(emulated_kernels, order="random", resident=3) as emulated:
        yield emulated

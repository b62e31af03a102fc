"""The ordinary tests of the ops, on the CUDA kernels."""

import pytest

from tests.cuda_on_cpu.adopt import adopt
from tests.gpu import test_graphs, test_half_precision
from tests.gpu.cases import CASES, HALF, op_of

pytestmark = pytest.mark.usefixtures("cuda_on_cpu")

adopt(
    globals(),
    "test_advantages",
    "test_gae",
    "test_kl_rewards",
    "test_linear_logprob",
    "test_lora_linear_decode",
    "test_masked_whiten",
    "test_ppo_loss",
)


@pytest.mark.parametrize("name", [n for n in CASES if op_of(n) != "lora_linear"])
def test_bodies_of_the_graph_tests(name):
    """What a GPU captures and replays, called: inputs change in place between the calls."""
    test_graphs.test_replay_sees_new_values(name, "cuda", "cpu")
    test_graphs.test_replays_are_alike(name, "cuda", "cpu")


@pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d)[6:])
def test_body_of_the_half_precision_test(dtype):
    test_half_precision.test_half_precision("linear_logprob", "cuda", "cpu", dtype)

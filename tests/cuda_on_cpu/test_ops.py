"""The ordinary tests of the ops, on the CUDA kernels."""

import pytest

from tests.cuda_on_cpu.adopt import adopt

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

import subprocess
import sys

import pytest

import hydra_kernels
import hydra_rlhf

FIXED_OPS = ("lora_linear", "linear_logprob", "ppo_loss", "kl_rewards", "gae", "masked_whiten")


def test_every_public_name_is_there():
    for package in (hydra_kernels, hydra_rlhf):
        assert sorted(package.__all__) == list(package.__all__)
        for name in package.__all__:
            assert getattr(package, name) is not None
            assert name in dir(package)
    assert set(FIXED_OPS) | {"available_backends"} <= set(hydra_kernels.__all__)
    with pytest.raises(AttributeError, match="'hydra_rlhf' has no attribute 'HydraModle'"):
        _ = hydra_rlhf.HydraModle


def test_the_engine_is_where_rollouts_are():
    from hydra_rlhf import RolloutEngine, rollout

    assert rollout.RolloutEngine is RolloutEngine
    with pytest.raises(AttributeError, match="'hydra_rlhf.rollout' has no attribute"):
        _ = rollout.RolloutEngin


def test_help_does_not_wait_for_torch():
    code = "import sys, hydra_rlhf.cli; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"

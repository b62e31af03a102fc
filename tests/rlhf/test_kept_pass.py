"""The scoring pass that is kept for the first epoch of the update."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from hydra_rlhf import ppo
from hydra_rlhf.config import METHODS
from hydra_rlhf.experience import Experience, kept_roles
from hydra_rlhf.faults import Shrinking
from hydra_rlhf.methods import method_from_model
from hydra_rlhf.model import HydraModel
from hydra_rlhf.rollout import Rollout
from tests.rlhf.families import batch
from tests.rlhf.test_ppo import numbers, plain_model, run, settings


@pytest.mark.parametrize(
    ("method", "changes", "saved"),
    [
        ("ppo", {}, 1),
        ("lora-ppo", {"gradient_checkpointing": True}, 1),
        ("hydra-ppo", {}, 1),
        ("hydra-ppo", {"kl_estimator": "exact"}, 1),
        ("hydra-ppo", {"lora_last_k": 1, "critic_warmup_steps": 1}, 1),
        ("j-hydra-ppo", {}, 1),
        ("j-hydra-ppo", {"rollout_logprobs": "reuse"}, 1),
        # Autocast keeps casts of weights; one made without gradient must not enter a graph.
        *((method, {"mixed_precision": "bf16"}, 1) for method in METHODS),
        # Passes that are not the update's: of halves, without reference, with a head alone.
        ("hydra-ppo", {"local_rollout_forward_batch_size": 2}, 0),
        ("hydra-ppo", {"gradient_accumulation_steps": 2}, 0),
        ("j-hydra-ppo", {"kl_estimator": "exact"}, 0),
        ("j-hydra-ppo", {"critic_warmup_steps": 1}, 0),
        ("j-hydra-ppo", {"detach_values": True, "vf_coef": 5.0}, 0),
    ],
)
def test_a_kept_scoring_pass_is_the_first_epochs(monkeypatch, method, changes, saved):
    """One pass fewer, and the same numbers bit for bit."""
    changes = {"max_steps": 1, "num_mini_batches": 1, "batched_score": "no"} | changes
    calls = []
    real = HydraModel.hidden

    def counted(self, *args, **kwargs):
        calls.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(HydraModel, "hidden", counted)
    passes, found = [], []
    for keep in (False, True):
        calls.clear()
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate has one a process
        try:
            result = run(settings(method=method, keep_scoring_pass=keep, **changes))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        passes.append(len(calls))
        trained = [*result.models.actor_parameters(), *result.models.critic_parameters()]
        found.append((numbers(result)[0], [p.detach() for p in trained]))
    assert passes[0] - passes[1] == saved
    (without, expected), (kept, parameters) = found
    prefix = "reuse/prefix_flops_saved" in kept
    for name in without:
        if not name.startswith("reuse/"):
            assert kept[name] == without[name], name
    assert not prefix or kept["reuse/prefix_flops_saved"] < without["reuse/prefix_flops_saved"]
    for a, b in zip(parameters, expected, strict=True):
        assert torch.equal(a, b)


def test_no_graph_is_held_that_no_update_would_take():
    """Of a rollout that the update takes in pieces, or after a microbatch had to be halved."""
    models = method_from_model("hydra-ppo", plain_model(), lora=settings())
    whole = settings(num_mini_batches=1)
    assert kept_roles(whole, models) == ["critic"]
    for changes in ({"gradient_accumulation_steps": 2}, {"num_mini_batches": 2}):
        assert kept_roles(settings(**{"num_mini_batches": 1, **changes}), models) == []
    state = SimpleNamespace(config=whole, models=models, processes=SimpleNamespace(sharding=None))
    run = SimpleNamespace(state=state, microbatch=Shrinking("per_device_train_batch_size", 4))
    assert ppo.passes_to_keep(run, 1) == ["critic"]
    run.microbatch.size = 2
    assert ppo.passes_to_keep(run, 1) == []


def test_a_kept_pass_is_given_once_in_the_order_asked_for():
    models = method_from_model("hydra-ppo", plain_model(), lora=settings())
    ids, mask, response_mask = batch()
    rows = len(ids)
    rollout = Rollout(ids, mask, response_mask, torch.zeros(rows))
    score = models.score(ids, mask, response_mask, roles=("critic",))
    order = torch.arange(rows).flip(0)
    zeros = torch.zeros_like(score.values)
    experience = Experience(rollout, zeros, zeros, zeros, zeros, {}, score)
    assert torch.equal(experience.take_kept(order).values, score.values.flip(0))
    assert experience.take_kept(order) is None
    experience.kept = score
    assert experience.take_kept(order[1:]) is None and experience.kept is None

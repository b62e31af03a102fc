"""What each method is built of: the tensors that its optimizers hold, and what it saves."""

import pytest
import torch
from safetensors.torch import load_file

from hydra_rlhf.config import METHODS
from hydra_rlhf.methods import build_method, method_from_model
from hydra_rlhf.model import ROLES, VALUE_HEAD
from tests.rlhf.families import batch
from tests.rlhf.test_ppo import plain_model, settings


def test_save_and_build(tmp_path):
    """From a Hydra checkpoint on disk: every method starts at it, and what it saves loads."""
    source = plain_model()
    source.save_pretrained(tmp_path / "sft")
    inputs = batch()
    with torch.no_grad():
        expected = source.score(*inputs)
    for method in METHODS:
        models = build_method(method, tmp_path / "sft", lora=settings())
        with torch.no_grad():
            found = models.score(*inputs)
        for name in ("logprobs", "ref_logprobs", "values", "scores"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), (method, name)
        models.save(tmp_path / method, base_model=str(tmp_path / "sft"))
        assert (tmp_path / method / VALUE_HEAD).is_file()
        names = {"j-hydra-ppo": ["joint"]}.get(method, ["actor", "critic"])
        for name in names:
            file = "config.json" if method == "ppo" else "adapter_config.json"
            assert (tmp_path / method / name / file).is_file(), (method, name)


def test_optimizer_groups_hold_each_trained_tensor_once():
    for method in METHODS:
        models = method_from_model(method, plain_model(), lora=settings())
        actor, critic = models.actor_parameters(), models.critic_parameters()
        ids = [id(p) for p in (*actor, *critic)]
        assert len(ids) == len(set(ids)) and actor, method
        for role in ROLES[:2]:
            model = getattr(models, role)
            adapter = model.role(role).adapter
            if adapter is not None:
                assert {id(p) for p in model.adapter_parameters(adapter)} <= set(ids)
        assert len(critic) == 1 if method == "j-hydra-ppo" else len(critic) > 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_whole_critic_trains_what_its_values_read(family):
    """Its output head is in no value, unless it is the input embedding as well (GPT-2's)."""
    models = method_from_model("ppo", plain_model(family))
    critic = {id(p) for p in models.critic_parameters()}
    lm = models.critic.causal_lm
    assert (id(lm.get_output_embeddings().weight) in critic) == (family == "gpt2")
    assert id(lm.get_input_embeddings().weight) in critic
    assert id(models.actor.causal_lm.get_output_embeddings().weight) in {
        id(p) for p in models.actor_parameters()
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_value_head_that_is_saved_is_the_one_trained(method, tmp_path):
    models = method_from_model(method, plain_model(), lora=settings())
    with torch.no_grad():
        models.critic.value_head.weight.add_(1.0)
    models.save(tmp_path)
    saved = load_file(tmp_path / VALUE_HEAD)
    assert any(torch.equal(value, models.critic.value_head.weight) for value in saved.values())

"""HydraModel where a mistake shows in one corner only: other models, parts of a batch, files."""

from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file

from hydra_rlhf import processes
from hydra_rlhf import trunk as trunks
from hydra_rlhf.errors import UserError
from hydra_rlhf.experience import score_by, shared_prefixes
from hydra_rlhf.methods import MethodModels
from hydra_rlhf.model import ROLES, HydraModel, default_lora_config
from hydra_rlhf.processes import Processes
from hydra_rlhf.rollout import Rollout
from tests.rlhf.families import batch, make_lm, make_model
from tests.rlhf.test_ppo import settings


def test_modes_are_left_as_they_were():
    """Those of every module, also where some were set apart, and after an error."""
    model = make_model("llama").train()
    model.trunk.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError), model.no_dropout():
        assert not any(module.training for module in model.base.modules())
        raise ZeroDivisionError
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2


def test_generation_is_of_the_role_that_is_asked_for():
    model = make_model("llama", trained=True)
    ids, mask, _ = batch(padded=False)
    sampling = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
    plain = make_lm("llama").generate(ids, **sampling)
    assert torch.equal(model.generate(ids, role="reference", **sampling), plain)
    assert not torch.equal(model.generate(ids, **sampling), plain)


@pytest.mark.parametrize("adapters", [("actor", "critic"), ()], ids=["adapters", "in full"])
def test_reference_and_reward_are_constants(adapters):
    model = make_model("llama", adapters, trained=True)
    out = model.score(*batch(), roles=ROLES)
    assert out.logprobs.requires_grad and out.values.requires_grad
    assert not out.ref_logprobs.requires_grad and not out.scores.requires_grad
    roles = ("critic", "reference", "reward")
    out = model.score(*batch(), roles=roles, batched=True)
    assert out.values.requires_grad
    assert not out.ref_logprobs.requires_grad and not out.scores.requires_grad


def test_a_saved_model_loads_with_a_reference_adapter(tmp_path):
    trained = make_model("llama", trained=True)
    trained.save_pretrained(tmp_path)
    model = HydraModel.from_pretrained(
        tmp_path,
        adapters=("actor",),
        lora_config=default_lora_config(make_lm("llama"), r=4, lora_alpha=8),
        reference_adapter=str(tmp_path / "actor"),
    )
    with torch.no_grad():
        expected = trained.score(*batch(), roles=("actor",)).logprobs
        found = model.score(*batch(), roles=("reference",)).ref_logprobs
    assert torch.equal(found, expected)


def test_a_saved_model_has_the_weights_of_the_decoder_alone(tmp_path):
    make_model("llama", trained=True).save_pretrained(tmp_path / "adapted")
    make_lm("llama").save_pretrained(tmp_path / "plain")
    file = "model.safetensors"
    adapted, plain = (load_file(tmp_path / name / file) for name in ("adapted", "plain"))
    assert adapted.keys() == plain.keys()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([2], "has weights this model lacks: base_model.model.model.layers.1"),
        ([0, 1, 2], "lacks weights of this model: base_model.model.model.layers.0"),
    ],
)
def test_adapters_of_other_layers_are_not_taken_for_these(layers, message, tmp_path):
    make_model("llama", layers_to_transform=[1, 2]).save_adapters(tmp_path)
    with pytest.raises(UserError, match=message):
        make_model("llama", layers_to_transform=layers).load_adapters(tmp_path)


@pytest.mark.parametrize("reentrant", [True, False])
def test_each_block_that_runs_is_recomputed_and_no_other(reentrant):
    model = make_model("llama", trained=True, layers_to_transform=[1, 2])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = batch()
    prefix = model.compute_prefix(*inputs[:2])
    calls = []
    for i, block in enumerate(trunks.blocks(model.trunk)):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    loss = model.score(*inputs, roles=("actor",), prefix=prefix).logprobs.sum()
    assert calls == [1, 2]
    loss.backward()
    assert calls == [1, 2, 2, 1]


def test_operations_where_heads_are_wider_than_the_model():
    """Qwen3's: 4 heads of 16 over a model of 32; 2 for each weight and token, 4 L for attention."""
    lm = make_lm("qwen3", head_dim=16)
    weights = 32 * 64 * 2 + 32 * 32 * 2 + 3 * 32 * 48  # q and o; k and v; the MLP
    assert trunks.flops(lm.model, 0, 2, 3, 5) == 2 * 3 * 5 * (2 * weights + 4 * 5 * 64)


@pytest.mark.parametrize("size", [4, 3])
def test_scoring_in_parts_takes_the_prefix_of_each_model_and_row(size):
    """The policy and the reward model are other weights, and the last part is smaller."""
    lora = dict(layers_to_transform=[1, 2], trained=True)
    actor = make_model("llama", ("actor",), seed=1, **lora)
    critic = make_model("llama", ("critic",), seed=2, **lora)
    models = MethodModels("d-lora-ppo", actor, critic, actor, critic)
    ids, mask, response_mask = batch()
    rollout = Rollout(ids, mask, response_mask, torch.zeros(len(ids), dtype=torch.bool))
    config = settings(method="d-lora-ppo", local_rollout_forward_batch_size=size)
    with torch.no_grad():
        prefixes = shared_prefixes(config, models, rollout)
        assert list(prefixes) == [0, 1] and not torch.equal(prefixes[0].hidden, prefixes[1].hidden)
        found = score_by(size, config, models, rollout, prefixes, ROLES)
        expected = score_by(4, config, models, rollout, {}, ROLES)
    for name in ("logprobs", "ref_logprobs", "values", "scores"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), atol=2e-5, rtol=1e-4, msg=name
        )


def test_gradients_are_summed_in_buckets_of_one_dtype(monkeypatch):
    """Of at most so many elements, or one tensor that is larger; none is left out or mixed up."""
    monkeypatch.setattr(processes, "BUCKET", 10)
    parameters, sizes = [], []
    for i, (count, dtype) in enumerate(
        [(6, torch.float32), (4, torch.float32), (1, torch.float32), (25, torch.float32)]
        + [(3, torch.bfloat16), (0, torch.bfloat16), (2, torch.float32)]
    ):
        parameter = torch.nn.Parameter(torch.zeros(count, dtype=dtype))
        parameter.grad = torch.full_like(parameter, i + 1)
        parameters.append(parameter)
    parameters.insert(2, torch.nn.Parameter(torch.zeros(3)))  # without a gradient

    def twice(tensor):
        sizes.append((len(tensor), tensor.dtype))
        return 2 * tensor

    Processes.sum_gradients(SimpleNamespace(count=2, sum=twice), parameters)
    assert parameters.pop(2).grad is None
    for i, parameter in enumerate(parameters):
        assert (parameter.grad == 2 * (i + 1)).all()
    full, half = torch.float32, torch.bfloat16
    assert sizes == [(10, full), (1, full), (25, full), (3, half), (2, full)]


def test_an_adapter_that_is_copied_has_the_same_rank(tmp_path):
    make_model("llama", ("actor",), trained=True).save_adapters(tmp_path)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="another rank or other layers than actor's"):
        HydraModel(
            make_lm("llama"),
            adapters=("actor",),
            lora_config=config,
            reference_adapter=str(tmp_path / "actor"),
        )


def test_the_exact_kl_is_of_the_model_that_has_both_policies():
    """Of two models the second has neither; it is not asked for it."""
    actor = make_model("llama", ("actor",), seed=1, trained=True)
    critic = make_model("llama", ("critic",), seed=2, trained=True)
    models = MethodModels("d-lora-ppo", actor, critic, actor, critic)
    with torch.no_grad():
        found = models.score(*batch(), kl=True)
        expected = actor.score(*batch(), roles=("actor", "reference"), kl=True).kl
        values = critic.score(*batch(), roles=("critic",)).values
    assert torch.equal(found.kl, expected) and found.kl.any()
    assert torch.equal(found.values, values)

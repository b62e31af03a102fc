"""Where the heads lie: apart from the weights, which other programs read by a pattern."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hydra_rlhf import pretrained
from hydra_rlhf.config import METHODS
from hydra_rlhf.errors import UserError
from hydra_rlhf.export import export_classifier
from hydra_rlhf.methods import build_method
from hydra_rlhf.model import REWARD_HEAD, VALUE_HEAD, HydraModel
from hydra_rlhf.vllm_rollout import VLLMEngine
from tests.rlhf.families import PAD, make_tokenizer
from tests.rlhf.test_ppo import plain_model, settings
from tests.rlhf.test_vllm_rollout import SAMPLING, put_in
from tests.rlhf.vllm_stand_in import LLM


def as_it_was(folder):
    """Heads right beside the weights, as they were first written."""
    for name in (REWARD_HEAD, VALUE_HEAD):
        if (folder / name).is_file():
            (folder / name).rename(folder / (folder / name).name)
    (folder / "heads").rmdir()


@pytest.fixture
def sft(tmp_path):
    model = plain_model()
    model.save_pretrained(tmp_path / "sft")
    make_tokenizer().save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


@pytest.mark.parametrize("method", METHODS)
def test_nothing_lies_among_the_weights(method, sft, tmp_path):
    """vLLM, TGI and SGLang read ``*.safetensors`` and ``*.bin`` of the folder with config.json."""
    models = build_method(method, sft, lora=settings())
    models.save(tmp_path / "run", base_model=str(sft))
    whole = [file.parent for file in tmp_path.rglob("config.json")]
    assert len(whole) == (3 if method == "ppo" else 1)
    for folder in whole:
        assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
        assert not [*folder.glob("*.bin"), *folder.glob("*.pt")]
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
    for name in (REWARD_HEAD, VALUE_HEAD):
        assert (tmp_path / "run" / name).is_file()


def test_folders_of_before_are_read(sft, tmp_path):
    head = HydraModel.from_pretrained(sft).reward_head.weight
    assert head.any()
    models = build_method("hydra-ppo", sft, lora=settings())
    with torch.no_grad():
        models.critic.value_head.weight.add_(1.0)
    models.save(tmp_path / "run")
    as_it_was(sft)
    as_it_was(tmp_path / "run")
    assert torch.equal(HydraModel.from_pretrained(sft).reward_head.weight, head)
    export_classifier(sft, tmp_path / "classifier")
    again = build_method("hydra-ppo", sft, lora=settings())
    again.actor.load_adapters(tmp_path / "run")
    assert torch.equal(again.critic.value_head.weight, models.critic.value_head.weight)


def test_the_head_in_its_folder_goes_first_and_takes_the_place_of_the_older(sft):
    as_it_was(sft)
    old = sft / "reward_head.safetensors"
    model = HydraModel.from_pretrained(sft)
    changed = torch.nn.Linear(32, 1, bias=False)
    kept = old.read_bytes()
    pretrained.save_head(changed, sft, REWARD_HEAD)
    assert not old.exists()
    old.write_bytes(kept)
    assert torch.equal(HydraModel.from_pretrained(sft).reward_head.weight, changed.weight)
    model.save_pretrained(sft)
    assert not old.exists()
    again = HydraModel.from_pretrained(sft).reward_head.weight
    assert torch.equal(again, model.reward_head.weight)


@pytest.mark.parametrize("place", ["heads/reward_head.safetensors", "reward_head.safetensors"])
def test_heads_of_a_hub_name_are_fetched(place, tmp_path, monkeypatch):
    head = torch.nn.Linear(32, 1, bias=False)
    pretrained.save_head(head, tmp_path, REWARD_HEAD)
    if place != REWARD_HEAD:
        as_it_was(tmp_path)
    asked = []

    def cached(repo, name, **_):
        asked.append((repo, name))
        file = tmp_path / name
        return str(file) if file.is_file() else None

    monkeypatch.setattr(pretrained, "cached_file", cached)
    heads = pretrained.load_heads("someone/hydra", 32, torch.device("cpu"))
    assert torch.equal(heads["reward_head"].weight, head.weight) and heads["value_head"] is None
    places = [REWARD_HEAD, "reward_head.safetensors", VALUE_HEAD, "value_head.safetensors"]
    if place == REWARD_HEAD:
        places.remove("reward_head.safetensors")
    assert asked == [("someone/hydra", name) for name in places]


def test_vllm_samples_from_folders_of_before(sft, monkeypatch):
    put_in("stand-in", monkeypatch)
    tokens = torch.full((1, 3), PAD + 2)
    model = plain_model()
    for old in (False, True):
        if old:
            as_it_was(sft)
        VLLMEngine(str(sft))(model, tokens, torch.ones_like(tokens), SAMPLING, role="reference")
    assert [llm.requests for llm in LLM.made] == [[None], [None]]


def test_a_bias_of_the_reward_head_is_the_values_too(tmp_path, caplog):
    """The value head says what the reward head says, until it is trained and after it is saved."""
    lm = plain_model().causal_lm
    head = torch.nn.Linear(32, 1)
    model = HydraModel(lm, adapters=("actor", "critic"), reward_head=head)
    ids = torch.randint(3, 20, (2, 6))
    rows = (ids, torch.ones_like(ids))
    with torch.no_grad():
        assert torch.equal(model.forward_role("critic", *rows), model.forward_role("reward", *rows))
        model.value_head.bias.add_(1.0)
        assert torch.equal(model.reward_head.bias, head.bias)
    assert model.value_head.bias.requires_grad and not model.reward_head.bias.requires_grad

    model.save_pretrained(tmp_path / "sft")
    models = build_method("hydra-ppo", tmp_path / "sft", lora=settings())
    assert torch.equal(models.critic.value_head.bias, model.value_head.bias)
    with torch.no_grad():
        models.critic.value_head.bias.add_(1.0)
    models.save(tmp_path / "run")
    again = build_method("hydra-ppo", tmp_path / "sft", lora=settings())
    again.actor.load_adapters(tmp_path / "run")
    assert torch.equal(again.critic.value_head.bias, models.critic.value_head.bias)

    export_classifier(tmp_path / "sft", tmp_path / "classifier")
    assert f"lower by {head.bias.item():.4g}" in caplog.text


def test_adapters_whose_heads_have_a_bias_or_none(tmp_path):
    ids = torch.randint(3, 20, (2, 6))
    rows = (ids, torch.ones_like(ids))
    made = {}
    for bias in (False, True):
        lm, head = plain_model().causal_lm, torch.nn.Linear(32, 1, bias=bias)
        made[bias] = HydraModel(lm, adapters=("actor", "critic"), reward_head=head)
        made[bias].save_adapters(tmp_path / str(bias))
    with pytest.raises(UserError, match="has a bias, which this model's head has not"):
        made[False].load_adapters(tmp_path / "True")
    made[True].load_adapters(tmp_path / "False")  # as no bias says: zero
    with torch.no_grad():
        for role in ("critic", "reward"):
            says = [model.forward_role(role, *rows) for model in made.values()]
            assert torch.equal(*says)

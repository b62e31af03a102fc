"""Models in other people's formats: merged, as a classifier, and TRL's value heads."""

import copy
import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import processors

from hydra_rlhf import cli, pretrained
from hydra_rlhf.commands import ppo as ppo_command
from hydra_rlhf.errors import UserError
from hydra_rlhf.evaluate import load_policy
from hydra_rlhf.export import export_classifier, import_value_head, merge_adapter
from hydra_rlhf.methods import build_method, method_from_model
from hydra_rlhf.model import VALUE_HEAD, HydraModel, position_ids
from hydra_rlhf.rewards import ClassifierReward
from tests.rlhf.families import (
    EOS,
    FAMILIES,
    PAD,
    PROMPTS,
    batch,
    make_lm,
    make_model,
    make_tokenizer,
)
from tests.rlhf.test_ppo import settings
from tests.rlhf.test_run_sampling import run_folder


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_model_is_the_actor(family, tmp_path):
    model = make_model(family, trained=True)
    make_lm(family).save_pretrained(tmp_path / "sft")
    make_tokenizer().save_pretrained(tmp_path / "sft")
    model.save_adapters(tmp_path / "run", base_model=str(tmp_path / "sft"))
    merge_adapter(tmp_path / "run" / "actor", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids, mask, _ = batch()
    with torch.no_grad():
        expected = model.forward_role("actor", ids, mask)
        logits = merged(ids, attention_mask=mask, position_ids=position_ids(mask)).logits
        base = model.forward_role("reference", ids, mask)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-3)
    assert (expected - base).abs().max() > 1e-2
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "merged")
    assert tokenizer.encode("w3 w4") == [3, 4]


def tuned_base(folder):
    """A base whose own generation settings are not those of plain sampling."""
    lm = make_lm("llama")
    lm.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.3, top_k=20, top_p=0.8, repetition_penalty=1.3, eos_token_id=7
    )
    lm.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


TRAINED = settings(
    temperature=0.7, top_p=0.9, min_response_length=2, stop_token_id=9, response_length=5
)


def as_trained(folder):
    """The generation settings in a folder, less those that are not set."""
    found = transformers.GenerationConfig.from_pretrained(folder).to_diff_dict()
    return {k: v for k, v in found.items() if k != "transformers_version"}


EXPECTED = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 0,
    "top_p": 0.9,
    "min_new_tokens": 2,
    "eos_token_id": [EOS, 9],
    "pad_token_id": PAD,
}


def test_a_merged_policy_is_sampled_as_it_was_trained(tmp_path):
    tuned_base(tmp_path / "sft")
    run_folder(tmp_path / "run", ppo=dataclasses.asdict(TRAINED))
    model = make_model("llama", trained=True)
    for folder in ("run", "other"):
        model.save_adapters(tmp_path / folder, base_model=str(tmp_path / "sft"))
        merge_adapter(tmp_path / folder / "actor", tmp_path / f"{folder}-merged")
    assert as_trained(tmp_path / "run-merged") == EXPECTED
    # An adapter that lies in no run of PPO's keeps what its base came with.
    assert as_trained(tmp_path / "other-merged") == as_trained(tmp_path / "sft")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run-merged")
    assert merged.generate(torch.full((2, 3), 5), max_new_tokens=2).shape == (2, 5)


def test_a_policy_that_is_a_whole_model_is_sampled_as_it_was_trained(tmp_path):
    tuned_base(tmp_path / "sft")
    models = method_from_model("ppo", HydraModel.from_pretrained(tmp_path / "sft"))
    ppo_command.save(models, make_tokenizer(), tmp_path / "run", TRAINED)
    assert as_trained(tmp_path / "run" / "actor") == EXPECTED


def test_a_base_is_found_from_another_folder(tmp_path, monkeypatch):
    """An adapter trained by a command with relative paths, merged by one given elsewhere."""
    family = FAMILIES[0]
    make_lm(family).save_pretrained(tmp_path / "work" / "runs" / "sft")
    make_tokenizer().save_pretrained(tmp_path / "work" / "runs" / "sft")
    model = make_model(family, trained=True)
    model.save_adapters(tmp_path / "work" / "runs" / "ppo", base_model="runs/sft")
    adapter = tmp_path / "work" / "runs" / "ppo" / "actor"
    monkeypatch.chdir(tmp_path)
    assert pretrained.base_of("work/runs/ppo/actor", "runs/sft") == str(
        tmp_path / "work" / "runs" / "sft"
    )
    for named in ("runs/other", "owner/name", str(tmp_path / "no"), None):
        assert pretrained.base_of(adapter, named) == named
    monkeypatch.chdir(tmp_path / "work")
    assert pretrained.base_of("runs/ppo/actor", "runs/sft") == "runs/sft"
    monkeypatch.chdir(tmp_path / "work" / "runs" / "ppo")
    merge_adapter("actor", tmp_path / "merged")
    policy, _ = load_policy("actor")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, weight in policy.causal_lm.state_dict().items():
        assert torch.equal(weight, merged.state_dict()[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_classifier_gives_the_reward(family, tmp_path):
    model = make_model(family, ())
    model.save_pretrained(tmp_path / "hydra")
    make_tokenizer().save_pretrained(tmp_path / "hydra")
    export_classifier(tmp_path / "hydra", tmp_path / "classifier")
    judge = ClassifierReward(tmp_path / "classifier", tokenizer=make_tokenizer())
    completions = [" w5 w6", " w7", " w8 w9 w10", " w11"]
    scores = torch.tensor(judge(prompts=PROMPTS[:4], completions=completions))
    for prompt, completion, score in zip(PROMPTS, completions, scores, strict=False):
        ids = torch.tensor([make_tokenizer().encode(prompt + completion)])
        expected = model.forward_role("reward", ids, torch.ones_like(ids))[0, -1]
        torch.testing.assert_close(score, expected.detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded"])
def test_value_heads_of_trl(layout, tmp_path):
    weight, bias = torch.randn(1, 32), torch.randn(1)
    other = {"pretrained_model.x": torch.zeros(2)}
    state = {"v_head.summary.weight": weight, "v_head.summary.bias": bias}
    if layout == "safetensors":
        save_file({**state, **other}, tmp_path / "model.safetensors")
    elif layout == "bin":
        torch.save({**state, **other}, tmp_path / "pytorch_model.bin")
    else:
        save_file(other, tmp_path / "model-00001-of-00002.safetensors")
        save_file(state, tmp_path / "model-00002-of-00002.safetensors")
        names = {k: "model-00002-of-00002.safetensors" for k in state}
        names |= {k: "model-00001-of-00002.safetensors" for k in other}
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": names}))
    head = import_value_head(tmp_path)
    assert torch.equal(head.weight, weight) and torch.equal(head.bias, bias)
    model = HydraModel(make_lm("llama"), value_head=head)
    inputs = batch()
    hidden = model.hidden(*inputs[:2])[:, -6:-1]
    expected = (hidden @ weight[0] + bias).masked_fill(~inputs[2], 0.0)
    torch.testing.assert_close(model.score(*inputs, roles=("critic",)).values, expected)
    model.save_heads(tmp_path / "heads")
    make_lm("llama").save_pretrained(tmp_path / "heads")
    again = HydraModel.from_pretrained(tmp_path / "heads")
    assert torch.equal(again.value_head.bias, bias)


def test_trl_checkpoints_bring_their_value_head(tmp_path, monkeypatch):
    """As they are, and again from what is saved; a head of its own file goes first."""
    lm = make_lm("llama")
    lm.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    weight, bias = torch.randn(1, 32), torch.randn(1)
    state |= {"v_head.summary.weight": weight, "v_head.summary.bias": bias}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for method, adapters in (("hydra-ppo", 2), ("lora-ppo", 1), ("ppo", 0)):
        models = build_method(method, tmp_path, lora=settings(), score_with_model=False)
        assert len(models.critic.adapters) == adapters
        assert torch.equal(models.critic.value_head.weight, weight)
        assert torch.equal(models.critic.value_head.bias, bias)
    assert not models.critic.reward_head.weight.any()
    HydraModel.from_pretrained(tmp_path).save_heads(tmp_path)
    own = torch.nn.Linear(32, 1)
    pretrained.save_head(own, tmp_path, VALUE_HEAD)
    assert torch.equal(HydraModel.from_pretrained(tmp_path).value_head.weight, own.weight)
    (tmp_path / VALUE_HEAD).unlink()
    state["v_head.summary.weight"] = torch.randn(1, 31)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="value head is 31 wide, not 32"):
        HydraModel.from_pretrained(tmp_path)


def templated():
    """Turns are w90 for a user and w91 for an assistant, closed by w92; plain text is after w94."""
    backend = copy.deepcopy(make_tokenizer().backend_tokenizer)
    backend.post_processor = processors.TemplateProcessing(
        single="w94 $A", special_tokens=[("w94", 94)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ {'user': 'w90 ', 'assistant': 'w91 '}[m.role] }}"
        "{{ m.content }} w92 {% endfor %}"
    )
    return tokenizer


def test_a_classifier_judges_turns_of_its_own_template(tmp_path):
    """By hand: the ids of template and texts, through the classifier alone."""
    model = make_model("llama", ())
    model.save_pretrained(tmp_path / "hydra")
    export_classifier(tmp_path / "hydra", tmp_path / "classifier")
    texts = {"prompts": ["w3", "w4 w5"], "completions": ["w6", "w7"]}
    history = [{"role": "user", "content": "w8"}, {"role": "assistant", "content": "w9"}]
    history.append({"role": "user", "content": "w3"})

    def expected(*rows):
        found = []
        for row in rows:
            ids = torch.tensor([row])
            with torch.no_grad():
                reward = model.forward_role("reward", ids, torch.ones_like(ids))
            found.append(float(reward[0, -1]))
        return pytest.approx(found, abs=2e-5, rel=1e-4)

    def judge(**kwargs):
        return ClassifierReward(tmp_path / "classifier", tokenizer=templated(), **kwargs)

    turns = [90, 3, 92, 91, 6, 92], [90, 4, 5, 92, 91, 7, 92]
    assert judge(apply_chat_template=True)(**texts) == expected(*turns)
    messages = [history, None]
    long = [90, 8, 92, 91, 9, 92, 90, 3, 92, 91, 6, 92]
    plain = ClassifierReward(tmp_path / "classifier", tokenizer=make_tokenizer())
    joined = {"prompts": ["w3 ", "w4 w5 "], "completions": texts["completions"]}
    assert plain(**joined, prompt_messages=messages) == expected([3, 6], [4, 5, 7])
    assert judge()(**joined, prompt_messages=messages) == expected(long, [94, 4, 5, 7])
    with pytest.raises(UserError, match="has no chat template"):
        ClassifierReward(
            tmp_path / "classifier", tokenizer=make_tokenizer(), apply_chat_template=True
        )


def test_a_classifier_keeps_the_end_of_a_long_text(tmp_path, caplog):
    """The context is 64 tokens; a tokenizer that pads and cuts on the left is put right."""
    model = make_model("gpt2", ())
    model.save_pretrained(tmp_path / "hydra")
    export_classifier(tmp_path / "hydra", tmp_path / "classifier")
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    words = [f"w{30 + i % 60}" for i in range(90)]
    judge = ClassifierReward(tmp_path / "classifier", tokenizer=tokenizer)
    with caplog.at_level("WARNING", "hydra_rlhf"):
        long, short, _ = judge(
            prompts=[" ".join(words[:80]) + " ", "w3 ", " ".join(words) + " "],
            completions=[" ".join(words[80:]), "w4", "w5"],
        )
    assert caplog.text.count("context is 64 tokens and a text has 90") == 1
    for score, row in ((long, [30 + i % 60 for i in range(26, 90)]), (short, [3, 4])):
        ids = torch.tensor([list(row)])
        with torch.no_grad():
            reward = model.forward_role("reward", ids, torch.ones_like(ids))
        assert score == pytest.approx(float(reward[0, -1]), abs=2e-5, rel=1e-4)


def test_refusals(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    index = tmp_path / "escape"
    index.mkdir()
    names = {"weight_map": {"v_head.summary.weight": "../model.safetensors"}}
    (index / "model.safetensors.index.json").write_text(json.dumps(names))
    make_lm("llama").save_pretrained(tmp_path / "sft")
    cases = [
        (lambda: merge_adapter(adapter, full), "already holds something"),
        (lambda: merge_adapter(adapter, tmp_path / "out"), "no adapter_config.json"),
        (lambda: export_classifier(tmp_path / "sft", tmp_path / "out"), "has no reward head"),
        (lambda: import_value_head(adapter), "has no value head"),
        (lambda: import_value_head(tmp_path / "sft"), "has no value head"),
        (lambda: import_value_head(index), "outside its folder"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert (full / "file").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_command(tmp_path, capsys):
    model = make_model("llama", trained=True)
    make_lm("llama").save_pretrained(tmp_path / "sft")
    model.save_adapters(tmp_path / "run", base_model=str(tmp_path / "sft"))
    source, out = str(tmp_path / "run" / "actor"), str(tmp_path / "merged")
    assert cli.main(["export", source, out]) == 2
    assert "give one of --merge and --classifier" in capsys.readouterr().err
    assert cli.main(["export", "--merge", "--source", source, "--output", out]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()

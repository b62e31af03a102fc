"""Models in other people's formats: merged, as a classifier, and TRL's value heads."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from hydra_rlhf import cli
from hydra_rlhf.errors import UserError
from hydra_rlhf.export import export_classifier, import_value_head, merge_adapter
from hydra_rlhf.model import HydraModel, position_ids
from hydra_rlhf.rewards import ClassifierReward
from tests.rlhf.families import FAMILIES, PROMPTS, batch, make_lm, make_model, make_tokenizer


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
        (lambda: import_value_head(adapter), "has no model weights"),
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

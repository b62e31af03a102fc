"""A policy that is a whole model, of method ppo: its folder is all that anybody needs."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hydra_rlhf import cli
from hydra_rlhf.errors import UserError
from hydra_rlhf.evaluate import load_tokenizer
from tests.rlhf.test_cli import fails, model, with_reward_head  # noqa: F401


@pytest.fixture
def run(model, tmp_path):  # noqa: F811
    with_reward_head(model, tmp_path / "sft")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "The rain."}) + "\n")
    argv = f"""ppo --method ppo --sft-model-path {tmp_path}/sft --prompts {tmp_path}/prompts.jsonl
        --output-dir {tmp_path}/run --max-steps 1 --per-device-train-batch-size 2
        --response-length 4 --device cpu""".split()
    assert cli.main(argv) == 0
    return tmp_path / "run"


def test_it_loads_evaluates_and_needs_no_merge(run, capsys):
    actor = run / "actor"
    AutoModelForCausalLM.from_pretrained(actor)
    text = "The rain."
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "sft")
    assert AutoTokenizer.from_pretrained(actor).encode(text) == tokenizer.encode(text)
    argv = ["evaluate", f"sft={run.parent}/sft", f"ppo={run}", "--show", "0", "--device", "cpu"]
    assert cli.main([*argv, "--prompts", f"{run.parent}/prompts.jsonl"]) == 0
    assert "response_length 4 (as ppo was trained)" in " ".join(capsys.readouterr().out.split())
    line = fails(capsys, "export", run, run.parent / "merged", "--merge")
    assert f"{actor} is a whole model already: load or copy it as it is" in line


def test_a_folder_without_a_tokenizer_is_told_as_that(run):
    for file in (run / "actor").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="actor: there is none in it; copy the tokenizer's files"):
        load_tokenizer(run / "actor")

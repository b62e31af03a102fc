"""Policies are compared as they were trained to sample, and what was taken from where is said."""

import json
import shutil

import pytest
import yaml

from hydra_rlhf import cli, evaluate, run_sampling
from hydra_rlhf import rollout as rollouts
from hydra_rlhf.data import Prompt
from hydra_rlhf.errors import UserError
from hydra_rlhf.evaluate import Answers
from hydra_rlhf.rollout import Sampling
from hydra_rlhf.run_sampling import DEFAULTS, choose, recorded
from tests.rlhf.families import EOS, PAD, make_model, make_tokenizer

TRAINED = {"temperature": 0.7, "response_length": 12, "top_k": 5, "stop_token_id": 9, "lora_r": 8}
TEMPLATE = "{% for m in messages %}w40 {{ m['content'] }} w41{% endfor %}"


def run_folder(path, **sections):
    path.mkdir(parents=True, exist_ok=True)
    (path / "run.json").write_text("{}")
    (path / "config.yaml").write_text(yaml.safe_dump(sections))
    return path


@pytest.mark.parametrize("part", ["", "actor", "ppo/joint", "checkpoints/step-00000002/actor"])
def test_what_a_run_records_is_found_from_its_parts(part, tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "run", input={"temperature": 3}, ppo=TRAINED) / part
    folder.mkdir(parents=True, exist_ok=True)
    expected = {name: value for name, value in TRAINED.items() if name != "lora_r"}
    assert recorded(folder) == expected
    monkeypatch.chdir(tmp_path)
    assert recorded(folder.relative_to(tmp_path)) == expected


def test_what_is_no_run_of_ppo_records_nothing(tmp_path):
    run_folder(tmp_path, ppo=TRAINED)
    sft = run_folder(tmp_path / "sft", training={"temperature": 1.5})  # that of raft
    deep = tmp_path / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    (sft / "model").mkdir()
    for path in (sft, sft / "model", deep, tmp_path / "no-such", "someone/model"):
        assert recorded(path) == {}
    assert recorded(deep.parent)


@pytest.mark.parametrize("text", [None, "ppo: [", "\xff"])
def test_a_record_that_does_not_read_is_named(text, tmp_path):
    file = run_folder(tmp_path / "run") / "config.yaml"
    file.unlink() if text is None else file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="cannot read the settings of a run from .*config.yaml"):
        recorded(tmp_path / "run")


def test_flags_go_first_then_runs_then_defaults(tmp_path):
    run = run_folder(tmp_path / "run", ppo=TRAINED)
    policies = [("start", "someone/model"), ("ppo", run)]
    assert choose({}, policies[:1]).values == DEFAULTS
    assert str(choose({}, policies[:1])) == (
        "Sampling: temperature 1.0 (default), response_length 64 (default)"
    )
    chosen = choose({"temperature": 0.0, "top_k": None}, policies)
    expected = {**DEFAULTS, "temperature": 0.0, "response_length": 12, "top_k": 5}
    assert chosen.values == {**expected, "stop_token_id": 9}
    assert str(chosen) == (
        "Sampling: temperature 0.0 (--temperature), response_length 12 (as ppo was trained), "
        "top_k 5 (as ppo was trained), stop_token_id 9 (as ppo was trained)"
    )
    stop = choose({"stop_token": "w8"}, policies).values
    assert stop["stop_token"] == "w8" and stop["stop_token_id"] is None


def test_runs_that_differ_need_a_flag(tmp_path):
    policies = [
        (name, run_folder(tmp_path / name, ppo={"temperature": value}))
        for name, value in (("a", 0.7), ("b", 1.0))
    ]
    with pytest.raises(UserError, match="a was trained with temperature 0.7, b with 1.0: give --t"):
        choose({}, policies)
    assert choose({"temperature": 0.5}, policies).values["temperature"] == 0.5


@pytest.fixture
def policies(tmp_path):
    """A model with a reward head, and a run of PPO whose policy is that model."""
    make_model("llama", ()).save_pretrained(tmp_path / "sft")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "sft")
    run_folder(tmp_path / "run", ppo={"temperature": 0.7, "response_length": 7, "top_p": 0.9})
    shutil.copytree(tmp_path / "sft", tmp_path / "run" / "actor")
    rows = [{"prompt": f"w{i} w5"} for i in range(3)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    messages = [{"prompt": [{"role": "user", "content": "w7"}]}] * 2
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in messages))
    return tmp_path


@pytest.fixture
def command(policies, capsys, monkeypatch):
    """``hydra-rlhf evaluate`` of both: its exit code, what it said, and how each was sampled."""
    asked = []

    def answer(name, model, tokenizer, prompts, sampling, *, apply_chat_template, **kwargs):
        asked.append((sampling, apply_chat_template))
        count = len(prompts)
        return Answers(name, ["w3"] * count, [1] * count, [True] * count, rewards=[0.0] * count)

    monkeypatch.setattr(evaluate, "answer", answer)

    def run(*flags, prompts="prompts.jsonl"):
        asked.clear()
        folders = f"sft={policies}/sft", f"ppo={policies}/run"
        argv = ["evaluate", *folders, "--prompts", f"{policies}/{prompts}", "--device", "cpu"]
        code = cli.main([*argv, "--output", f"{policies}/out", *flags])
        shown = capsys.readouterr()
        return code, " ".join((shown.out + shown.err).split()), list(asked)

    return run


def test_the_command_samples_all_policies_as_the_run_was_trained(command, policies):
    code, shown, asked = command()
    expected = Sampling(7, 0.7, (EOS,), PAD, top_p=0.9)
    assert code == 0 and asked == [(expected, False)] * 2
    assert "Sampling: temperature 0.7 (as ppo was trained), response_length 7 (as ppo" in shown
    written = json.loads((policies / "out" / "evaluation.json").read_text())["sampling"]
    assert written == {**DEFAULTS, "temperature": 0.7, "response_length": 7, "top_p": 0.9}


def test_flags_of_the_command_win(command):
    flags = ["--temperature", "0", "--response-length", "3", "--top-k", "4", "--top-p", "1"]
    flags += ["--min-response-length", "2", "--stop-token", "w8", "--apply-chat-template"]
    code, shown, asked = command(*flags)
    expected = Sampling(3, 1.0, (EOS, 8), PAD, 4, 1.0, 2, do_sample=False)
    assert code == 0 and asked == [(expected, True)] * 2, shown
    assert command("--stop-token-id", "11")[2][0][0].stop_ids == (EOS, 11)
    for flag, value, why in (
        ("--top-p", "0", "top_p must be in (0, 1], got 0.0"),
        ("--top-k", "-1", "top_k must not be negative, got -1"),
        ("--min-response-length", "8", "min_response_length 8 is above response_length 7"),
    ):
        code, shown, asked = command(flag, value)
        assert code == 2 and why in shown and not asked


def test_messages_are_not_put_into_the_template_twice(command, policies):
    file = policies / "run" / "config.yaml"
    file.write_text(yaml.safe_dump({"ppo": {"apply_chat_template": True}}))
    assert [wrapped for _, wrapped in command()[2]] == [True] * 2
    assert [wrapped for _, wrapped in command(prompts="chats.jsonl")[2]] == [False] * 2
    code, shown, _ = command("--apply-chat-template", prompts="chats.jsonl")
    assert code == 2 and "chats.jsonl has messages, which the chat template has made" in shown


def test_answers_are_to_the_prompt_in_its_template(monkeypatch):
    seen = []
    real = rollouts.generate

    def generate(model, ids, mask, *args, **kwargs):
        seen.append(ids[mask.bool()].tolist())
        return real(model, ids, mask, *args, **kwargs)

    monkeypatch.setattr(rollouts, "generate", generate)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    arguments = make_model("llama", ()), tokenizer, [Prompt("w5")], Sampling(2, 1.0, (EOS,), PAD)
    evaluate.answer("A", *arguments, apply_chat_template=True)
    evaluate.answer("A", *arguments)
    assert seen == [[40, 5, 41], [5]]


def test_a_prompt_that_is_too_long_is_told_by_its_number_before_the_first_answer(monkeypatch):
    monkeypatch.setattr(rollouts, "generate", lambda *a, **k: pytest.fail("sampled"))
    prompts = [Prompt("w5"), Prompt("w5"), Prompt("w3 " * 63)]
    model, sampling = make_model("llama", ()), Sampling(2, 1.0, (EOS,), PAD)
    with pytest.raises(UserError, match="prompt 3 has 63 tokens, more than 62"):
        evaluate.answer("A", model, make_tokenizer(), prompts, sampling, batch_size=1)


def test_every_setting_is_one_of_the_command_and_of_ppo():
    from hydra_rlhf.commands.evaluate import EvaluateConfig
    from hydra_rlhf.config import PPOConfig

    config, trained = EvaluateConfig(["a"]), PPOConfig()
    assert all(getattr(config, name) is None for name in run_sampling.DEFAULTS)
    assert all(hasattr(trained, name) for name in run_sampling.DEFAULTS)
    # Whatever shapes an answer in training is among them.
    shapes = {name for name in Sampling._fields if hasattr(trained, name)}
    assert shapes <= set(run_sampling.DEFAULTS) and len(shapes) >= 5

"""The command line: settings from flags and files, and bad input in one line with code 2."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hydra_rlhf import cli
from hydra_rlhf.commands.inputs import limits
from hydra_rlhf.commands.sft import ARGUMENTS as SFT_ARGUMENTS
from hydra_rlhf.data.bundled import build_tokenizer
from hydra_rlhf.errors import UserError
from hydra_rlhf.evaluate import load_policy, load_tokenizer
from hydra_rlhf.model import HydraModel

ROOT = Path(__file__).parents[2]
PAIR = {"prompt": "The rain.", "chosen": " I like it.", "rejected": " No."}


def write_checkpoint(path):
    """A tiny model with a context of 32 tokens, and its tokenizer."""
    tokenizer = build_tokenizer(["The rain. I like it. No."], 280, model_max_length=32)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text((json.dumps(PAIR) + "\n") * 8)
    return path


def fails(capsys, *argv):
    """The one line on stderr of a command that must exit with code 2."""
    assert cli.main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("hydra-rlhf: error: ")
    return err


# Settings


def parse_sft(*argv):
    needed = ["--model", "m", "--pair-data", "d", "--output-dir", "o"]
    return cli.parse("sft", "s", SFT_ARGUMENTS, [*needed, *argv])


def test_without_arguments_there_is_an_overview(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_setting_has_help(command, capsys):
    import importlib

    module = importlib.import_module(cli.COMMANDS[command][0])
    for kind in module.ARGUMENTS:
        for field in dataclasses.fields(kind):
            assert field.metadata.get("help"), f"{command} --{field.name}"
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert "--config" in capsys.readouterr().out


def test_help_shows_a_switch_once(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sft", "--help"])
    out = capsys.readouterr().out
    assert out.count("--use-margins") == 1 and "--use-margins, --no-use-margins" in out
    assert parse_sft("--no-use-margins")[1].use_margins is False


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_flags_win_over_the_file(tmp_path, name):
    file = tmp_path / name
    settings = {"training": {"gamma": 0.5, "batch_size": 4, "max_steps": None}, "epochs": 2}
    file.write_text(json.dumps(settings))  # JSON is YAML
    _, config, _ = parse_sft("--config", str(file), "--batch-size", "8")
    assert (config.gamma, config.batch_size, config.epochs, config.max_steps) == (0.5, 8, 2, None)


def test_yaml_numbers_are_numbers(tmp_path):
    """PyYAML reads 1e-4 as text; argparse makes the float of it."""
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-4\nuse_margins: false\n")
    _, config, _ = parse_sft("--config", str(tmp_path / "c.yaml"))
    assert config.learning_rate == 1e-4 and config.use_margins is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gama: 1", "unknown setting 'gama' (did you mean gamma?)"),
        ("gamma: [", "line 1: not YAML"),
        ("- 1", "expected settings"),
        ("gamma: x", "argument --gamma: expected a number, got 'x'"),
        ("gamma: {a: {b: 1}}", "unknown setting"),
        ("objective: best", "invalid choice"),
    ],
)
def test_a_bad_config_file(tmp_path, text, message, capsys):
    (tmp_path / "c.yaml").write_text(text)
    line = fails(capsys, "sft", "--config", tmp_path / "c.yaml")
    assert message in line and "c.yaml" in line


def test_a_bad_flag_is_not_the_config_files(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("gamma: 1\n")
    line = fails(capsys, "sft", "--config", tmp_path / "c.yaml", "--gamma", "x")
    assert line.startswith("hydra-rlhf: error: sft: argument --gamma: expected a number, got 'x'")


def test_bad_flags(capsys, tmp_path):
    assert "no such" in fails(capsys, "sft", "--config", tmp_path / "no.yaml").lower()
    assert "required: " in fails(capsys, "sft")
    assert "did you mean demo?" in fails(capsys, "dmeo")
    assert "did you mean --seed?" in fails(capsys, "demo", "--sed=1")
    assert "expected a whole number, got 'x'" in fails(capsys, "demo", "--seed", "x")


def test_a_mistyped_flag_is_named_before_the_one_that_is_missing_for_it(capsys):
    line = fails(capsys, "sft", "--modle", "m", "--pair-data", "d")
    assert "unknown setting --modle (did you mean --model?)" in line
    line = fails(capsys, "sft", "--model", "m")
    assert "the following arguments are required: --output-dir (example: " in line, "one spelling"


@pytest.mark.parametrize("command", cli.EXAMPLES)
def test_examples_of_the_help_are_commands(command, capsys):
    name, *words = cli.EXAMPLES[command].split()
    module = importlib.import_module(cli.COMMANDS[command][0])
    flags = cli._named(command, words, getattr(module, "POSITIONALS", ()))
    assert name == command and cli.parse(command, "s", module.ARGUMENTS, flags)
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert cli.EXAMPLES[command] in " ".join(capsys.readouterr().out.split())


# Bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "pairs.jsonl"),
        ("", "pairs.jsonl"),
        (json.dumps(PAIR) + "\n{not json\n", "2"),
        (json.dumps({"question": "x", "answer": "y"}), "prompt"),
        (json.dumps({**PAIR, "prompt": "The rain. " * 40}), "context of 32"),
    ],
    ids=["missing", "empty", "malformed-line-2", "columns", "prompt-too-long"],
)
def test_bad_data(tmp_path, model, text, message, capsys):
    if text is not None:
        (tmp_path / "pairs.jsonl").write_text(text)
    out = tmp_path / "run"
    line = fails(
        capsys,
        *("sft", "--model", model, "--pair-data", tmp_path / "pairs.jsonl", "--output-dir", out),
    )
    assert message in line
    assert not out.exists(), "nothing half-written"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "./no-such-model"], "cannot load a tokenizer from ./no-such-model"),
        (["--backend", "cuda"], "backend 'cuda' cannot run"),
        (["--gamma", "-1"], "gamma must be 0 or more"),
        (["--log-with", "nonsense"], "unknown tracker"),
    ],
)
def test_bad_settings_write_nothing(tmp_path, model, pairs, flags, message, capsys):
    out = tmp_path / "run"
    base = ["sft", "--model", model, "--pair-data", pairs, "--output-dir", out]
    assert message in fails(capsys, *base, *flags)
    assert not out.exists()


def test_an_output_folder_with_a_run_is_kept(tmp_path, model, pairs, capsys):
    out = tmp_path / "run"
    base = ["sft", "--model", model, "--pair-data", pairs, "--output-dir", out, "--max-steps", "1"]
    assert cli.main([str(a) for a in base]) == 0
    record = (out / "metrics.jsonl").read_text()
    assert "already holds a run" in fails(capsys, *base)
    assert (out / "metrics.jsonl").read_text() == record
    assert cli.main([str(a) for a in [*base, "--overwrite"]]) == 0


def test_a_reward_function_that_fails_leaves_a_folder_that_can_be_used(
    tmp_path, model, pairs, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rewards = tmp_path / "rewards_that_fail_at_first.py"
    rewards.write_text("def score(prompts, completions): return [float(c) for c in completions]")
    argv = ["ppo", "--sft-model-path", model, "--prompts", pairs, "--output-dir", "run"]
    argv += ["--reward-fn", f"{rewards.name}:score", "--max-steps", "1", "--response-length", "2"]
    assert "reward function score raised ValueError" in fails(capsys, *argv)
    monkeypatch.delitem(sys.modules, rewards.stem)
    rewards.write_text("def score(prompts, completions): return [len(c) for c in completions]")
    assert cli.main([str(a) for a in argv]) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert "already holds a run" in fails(capsys, *argv)


def test_overwriting_what_a_run_starts_from_is_refused(tmp_path, model, pairs, capsys):
    """`ppo --sft-model-path runs/a --output-dir runs/a --overwrite` would leave adapters alone."""
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "own.jsonl").write_text(pairs.read_text())
    sft = ["sft", "--output-dir", run, "--overwrite"]
    ppo = ["ppo", "--output-dir", run, "--overwrite", "--prompts"]
    for argv, lost in (
        ([*sft, "--model", run / "model", "--pair-data", pairs], run / "model"),
        ([*sft, "--model", model, "--pair-data", run / "own.jsonl"], run / "own.jsonl"),
        ([*ppo, pairs, "--sft-model-path", run], run),
        ([*ppo, run / "own.jsonl", "--sft-model-path", model], run / "own.jsonl"),
    ):
        assert f"--overwrite would delete {lost}, which" in fails(capsys, *argv)
    assert sorted(p.name for p in run.iterdir()) == ["model", "own.jsonl", "run.json"]


def test_each_objective_leaves_what_the_next_command_takes(tmp_path, model, pairs, capsys):
    """hydra a checkpoint with its head, dpo and raft an adapter for it, sft a model without."""
    (tmp_path / "sft.jsonl").write_text(
        json.dumps({"prompt": "The rain.", "completion": " I like it."}) + "\n"
    )

    def run(name, *flags):
        base = ["sft", "--output-dir", tmp_path / name, "--max-steps", "1", "--eval-share", "0"]
        assert cli.main([str(a) for a in (*base, *flags)]) == 0
        return tmp_path / name

    hydra = run("hydra", "--model", model, "--pair-data", pairs, "--learning-rate", "1e-2")
    assert (hydra / "model" / "heads" / "reward_head.safetensors").exists()
    start = ("--model", hydra / "model", "--lora-r", "2")
    for name, data in (("dpo", pairs), ("raft", pairs)):
        flags = ("--objective", name, "--pair-data", data, "--response-length", "4")
        folder = run(name, *start, *flags)
        assert (folder / "actor" / "adapter_model.safetensors").exists()
        assert not (folder / "model").exists()
        policy, _ = load_policy(folder)
        assert not policy.adapters
    merged = run("sft", *start, "--objective", "sft", "--sft-data", tmp_path / "sft.jsonl")
    assert not any("lora" in key for key in load_file(merged / "model" / "model.safetensors"))
    line = fails(
        capsys,
        *("ppo", "--sft-model-path", merged, "--prompts", pairs, "--response-length", "4"),
        *("--output-dir", tmp_path / "ppo"),
    )
    assert "no reward head" in line


def test_objectives_that_need_something_say_so(tmp_path, model, pairs, capsys):
    base = ["sft", "--model", model, "--pair-data", pairs, "--output-dir", tmp_path / "run"]
    assert "dpo needs lora_r" in fails(capsys, *base, "--objective", "dpo")
    flags = ["--objective", "raft", "--lora-r", "2"]
    assert "raft needs a reward head" in fails(capsys, *base, *flags)
    assert "is required" in fails(capsys, "sft", "--model", model, "--output-dir", tmp_path / "r")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prompts", ["The rain. " * 40, ""], ids=["too-long", "none"])
def test_bad_prompts_for_ppo(tmp_path, model, prompts, capsys):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": prompts}) if prompts else "")
    fails(
        capsys,
        *("ppo", "--sft-model-path", model, "--prompts", tmp_path / "p.jsonl"),
        *("--output-dir", tmp_path / "run", "--response-length", "8"),
    )
    assert not (tmp_path / "run").exists()


def test_adapters_for_layers_that_the_model_lacks(tmp_path, model, capsys):
    sft = with_reward_head(model, tmp_path / "sft")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "The rain."}) + "\n")
    argv = ("ppo", "--sft-model-path", sft, "--prompts", prompts, "--output-dir", tmp_path / "o")
    line = fails(capsys, *argv, "--lora-target-modules", "q_proj", "k_porj")
    assert "no layer of the decoder is named k_porj (linear layers: down_proj, " in line


def test_a_chat_template_that_is_not_there(tmp_path, model, capsys):
    sft = with_reward_head(model, tmp_path / "sft")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "The rain."}) + "\n")
    argv = ("ppo", "--sft-model-path", sft, "--prompts", prompts, "--output-dir", tmp_path / "o")
    line = fails(capsys, *argv, "--response-length", "8", "--apply-chat-template")
    assert "this tokenizer has no chat template" in line


def with_reward_head(model: Path, folder: Path) -> Path:
    """A checkpoint that ppo can start from."""
    start = HydraModel.from_pretrained(model)
    torch.nn.init.ones_(start.reward_head.weight)
    start.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return folder


def test_run_folders_of_sft_stand_for_the_models_in_them(tmp_path, model, capsys, monkeypatch):
    """As --sft-model-path takes one, so do the other settings that name a whole model."""
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    given = ["--pair-data", "pairs.jsonl", "--max-steps", "1", "--eval-share", "0"]
    first = ["sft", "--model", str(model), "--output-dir", "first", *given]
    assert cli.main([*first, "--objective", "sft"]) == 0
    second = ["sft", "--model", "first", "--output-dir", "second", *given]
    assert cli.main([*second, "--objective", "rm"]) == 0
    argv = ["ppo", "--sft-model-path", "first", "--reward-model-path", "second"]
    argv += ["--prompts", "pairs.jsonl", "--output-dir", "run", "--max-steps", "1"]
    argv += ["--response-length", "4", "--per-device-train-batch-size", "2", "--lora-r", "2"]
    assert cli.main([*argv, "--method", "lora-ppo"]) == 0
    written = yaml.safe_load(Path("run", "config.yaml").read_text())
    assert written["ppo"]["reward_model_path"] == str(Path("second", "model"))
    argv = ["plan", "first", "--reward-model-path", "second", "--prompt-length", "8"]
    assert cli.main([*argv, "--response-length", "8", "--no-batch-search"]) == 0
    capsys.readouterr()
    line = fails(capsys, "sft", "--model", "run", "--output-dir", "third", *given)
    assert "run is a run of ppo, which holds an adapter" in line


def test_the_seed_draws_the_adapters_of_ppo(tmp_path, model):
    """lora_A is drawn; after one step at a rate of 1e-30 it is still what was drawn."""
    start = with_reward_head(model, tmp_path / "start")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "The rain."}))
    drawn = {}
    for name, seed in (("a", 1), ("same", 1), ("b", 2)):
        argv = ["ppo", "--sft-model-path", start, "--prompts", tmp_path / "p.jsonl"]
        argv += ["--output-dir", tmp_path / name, "--response-length", "4", "--max-steps", "1"]
        argv += ["--per-device-train-batch-size", "2", "--learning-rate", "1e-30", "--seed", seed]
        assert cli.main([str(a) for a in argv]) == 0
        weights = load_file(tmp_path / name / "actor" / "adapter_model.safetensors")
        drawn[name] = torch.cat([w.flatten() for k, w in weights.items() if "lora_A" in k])
    assert torch.equal(drawn["a"], drawn["same"]) and not torch.equal(drawn["a"], drawn["b"])


def test_the_page_of_a_resumed_run_is_of_all_its_steps(tmp_path, model, pairs, capsys):
    with_reward_head(model, tmp_path / "start")
    run = tmp_path / "run"
    base = ["ppo", "--sft-model-path", tmp_path / "start", "--prompts", pairs, "--output-dir", run]
    base += ["--response-length", "4", "--per-device-train-batch-size", "2", "--save-steps", "1"]
    for flags in (["--max-steps", "1"], ["--max-steps", "2", "--resume"]):
        assert cli.main([str(a) for a in (*base, *flags)]) == 0
    first, second = (json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines())
    page = (run / "README.md").read_text()
    name = "objective/response_length"
    assert f"| {name} | {first[name]:.4f} | {second[name]:.4f} |" in page
    assert ", 2 steps of 2 responses.\n" in page
    capsys.readouterr()
    assert cli.main([str(a) for a in (*base, "--max-steps", "2", "--resume")]) == 0
    assert "All steps were done before: a larger --max-steps goes on" in capsys.readouterr().out
    assert (run / "README.md").read_text() == page
    assert "| at the last step | |" in (run / "actor" / "README.md").read_text()


def test_overlong_prompts_for_ppo(tmp_path, model, capsys, caplog):
    """A context of 32 less 8 for the response; the tokenizer adds nothing to a prompt."""
    lines = [json.dumps({"prompt": text}) for text in ("The rain. " * 40, "The rain.")]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    with_reward_head(model, tmp_path / "start")
    capsys.readouterr()

    def argv(name, *flags):
        base = ["ppo", "--sft-model-path", tmp_path / "start", "--prompts", tmp_path / "p.jsonl"]
        base += ["--output-dir", tmp_path / name, "--response-length", "8", "--max-steps", "1"]
        return [str(a) for a in (*base, "--per-device-train-batch-size", "2", *flags)]

    assert "prompt 1 has" in fails(capsys, *argv("a"))
    for choice, done in (("drop", "dropped"), ("truncate", "truncated")):
        assert cli.main(argv(choice, "--overlong", choice)) == 0
        assert f"1 of 2 examples did not fit and were {done}" in caplog.text
        shown = (tmp_path / choice / "samples.jsonl").read_text()
        assert shown.count('"The rain."') == (2 if choice == "drop" else 1)
    short = ("--overlong", "drop", "--response-length", "31")
    assert "at least 3 tokens" in fails(capsys, *argv("b", *short))
    assert "format" in fails(capsys, *argv("b", "--format", "no-such"))
    (tmp_path / "p.jsonl").write_text(lines[0])
    assert "p.jsonl: no prompts in it" in fails(capsys, *argv("b", "--overlong", "drop"))


def test_messages_are_not_wrapped_twice(tmp_path, model, capsys):
    start = with_reward_head(model, tmp_path / "start")
    tokenizer = load_tokenizer(start)
    argv = ["ppo", "--sft-model-path", start, "--prompts", tmp_path / "p.jsonl"]
    argv += ["--output-dir", tmp_path / "run", "--response-length", "4", "--max-steps", "1"]
    argv += ["--per-device-train-batch-size", "2", "--apply-chat-template"]
    capsys.readouterr()
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "The rain."}))
    assert "tokenizer has no chat template" in fails(capsys, *argv)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(start)
    messages = [{"role": "user", "content": "The rain."}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": messages}))
    capsys.readouterr()
    assert "apply_chat_template is for text prompts" in fails(capsys, *argv)
    assert not (tmp_path / "run").exists()
    assert cli.main([str(a) for a in argv[:-1]]) == 0


class Around:
    """A tokenizer of words that puts a token in front of a text."""

    eos_token_id, pad_token_id = 2, 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [7] * add_special_tokens + [5] * len(text.split())}

    def encode(self, text):
        return self(text)["input_ids"]


def test_limits_leave_room_for_the_response_and_what_the_tokenizer_adds(model, tmp_path):
    """Of a context of 32: less 1 that is added, less 8 of a response, or the user's own limit."""
    assert limits("drop", model, Around(), max_length=None)["max_length"] == 31
    found = limits("truncate", model, Around(), max_length=None, response_length=8)
    assert found == {"max_length": 23, "overlong": "truncate"}
    assert limits("drop", model, Around(), max_length=20, response_length=8)["max_length"] == 19
    with pytest.raises(UserError, match="overlong drop needs max_length: .* names no context"):
        limits("drop", str(tmp_path / "none"), Around(), max_length=None)


def test_overlong_pairs_for_sft(tmp_path, model, capsys, caplog):
    """The same three choices on the prompt, the answer cut as ever; each says what it did."""
    long = {**PAIR, "prompt": PAIR["prompt"] * 20}
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [PAIR, long, PAIR])))

    def argv(name, *flags):
        base = ["sft", "--model", model, "--pair-data", tmp_path / "p.jsonl", "--eval-share", "0"]
        base += ["--output-dir", tmp_path / name, "--max-steps", "1", "--batch-size", "3", *flags]
        return [str(a) for a in base]

    assert "prompt of training pair 2" in fails(capsys, *argv("a"))
    assert "p.jsonl, line 2: the prompt has" in fails(capsys, *argv("b", "--overlong", "error"))
    tokens = {}
    for choice, done in (("drop", "dropped"), ("truncate", "truncated")):
        caplog.clear()
        assert cli.main(argv(choice, "--overlong", choice)) == 0
        assert f"1 of 3 examples did not fit and were {done}" in caplog.text
        report = (tmp_path / choice / "README.md").read_text()
        tokens[choice] = int(report.partition(" steps, ")[2].partition(" tokens")[0])
    # Two rows of the truncated pair come to it, each all of the context.
    assert tokens["drop"] + 32 < tokens["truncate"] <= tokens["drop"] + 2 * 32
    assert "format" in fails(capsys, *argv("c", "--format", "no-such"))
    assert "has no pairs" in fails(capsys, *argv("d", "--format", "prompt-only"))


def test_an_adapter_is_not_a_model_to_start_from(tmp_path, capsys):
    (tmp_path / "actor").mkdir()
    (tmp_path / "actor" / "adapter_config.json").write_text("{}")
    argv = ("--prompts", "p", "--output-dir", tmp_path / "o")
    line = fails(capsys, "ppo", "--sft-model-path", tmp_path / "actor", *argv)
    assert "is an adapter, not a whole model: merge it first (hydra-rlhf export " in line
    (tmp_path / "run.json").write_text("{}")
    line = fails(capsys, "ppo", "--sft-model-path", tmp_path, *argv)
    assert f"merge it (hydra-rlhf export {tmp_path} FOLDER --merge)" in line
    line = fails(capsys, "ppo", "--sft-model-path", "m", "--dtype", "floaty", *argv)
    assert "dtype must be one of auto, float32, bfloat16, float16; got 'floaty'" in line


# Other endings


def test_interrupt_is_130_and_one_line(monkeypatch, capsys):
    def stop(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("hydra_rlhf.demo.run", stop)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "hydra-rlhf: interrupted\n"


def test_verbose_shows_the_traceback(tmp_path):
    with pytest.raises(UserError):
        cli.main(["sft", "--verbose"])


def test_a_bug_is_one_line_and_code_1(monkeypatch, capsys):
    monkeypatch.setattr("hydra_rlhf.demo.run", lambda config: 1 / 0)
    assert cli.main(["demo"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_module_is_the_program():
    done = subprocess.run(
        [sys.executable, "-m", "hydra_rlhf", "nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("hydra-rlhf: error: unknown command 'nothing'")

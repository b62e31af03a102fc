"""README and docs: every Python block runs, every command is one, every link leads somewhere.

Blocks of a page run in order, in one namespace and one folder. Where the README names files or a
model of the reader's, small ones are there under those names.
"""

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hydra_rlhf import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^hydra-rlhf (?!COMMAND)[a-z].*$", re.MULTILINE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, *languages: str) -> list[tuple[str, str, int]]:
    """(language, text, lines before it) of each fenced block."""
    text = path.read_text(encoding="utf-8")
    return [
        (found[1], found[2], text.count("\n", 0, found.start(2)))
        for found in FENCE.finditer(text)
        if found[1] in languages
    ]


def commands(text: str) -> list[list[str]]:
    """The words of each hydra-rlhf command, comments and continued lines seen through."""
    joined = text.replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in COMMAND.findall(joined)]


def run_python(path: Path, text: str, line: int, names: dict) -> None:
    # Blank lines in front, so that a traceback names the line of the page.
    exec(compile("\n" * line + text, str(path), "exec"), names)


@pytest.fixture(scope="module")
def example():
    """An example as a module; they import each other by bare names, as scripts do."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def folder_with_runs(tmp_path_factory, example):
    """What the pages call theirs: tiny, pairs, prompts, and runs/sft."""
    folder = tmp_path_factory.mktemp("docs")
    example("tiny_model").write(folder)
    argv = f"sft --model {folder / 'tiny'} --pair-data {folder / 'pairs.jsonl'} --max-steps 2"
    assert cli.main([*argv.split(), "--output-dir", str(folder / "runs" / "sft")]) == 0
    return folder


PYTHON_PAGES = [p for p in PAGES if blocks(p, "python") and p.name != "trainer.md"]


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name_of)
def test_python_blocks_run(page, folder_with_runs, tmp_path, monkeypatch):
    shutil.copytree(folder_with_runs, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    names: dict = {"__name__": "page"}
    for _, text, line in blocks(page, "python"):
        run_python(page, text, line, names)


def test_the_guide_runs_from_its_first_line_to_its_last(tmp_path, monkeypatch):
    page = ROOT / "docs" / "trainer.md"
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "page"}
    ran = []
    for language, text, line in blocks(page, "bash", "python"):
        if language == "python":
            run_python(page, text, line, names)
        elif text.startswith("python examples/"):
            script = [sys.executable, str(ROOT / text.split()[1]), *text.split()[2:]]
            subprocess.run(script, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        else:
            for words in commands(text):
                assert cli.main(words) == 0, words
                ran.append(words[0])
    assert ran == ["data", "plan", "sft", "ppo", "ppo", "evaluate", "export", "export"]
    section = page.read_text().split("### The run folder")[1].split("##")[0]
    for written in re.findall(r"^\| (.*) \| ", section, re.MULTILINE):
        for name in re.findall(r"`([\w./-]+)`", written):
            if name != "joint/":
                assert (tmp_path / "runs" / "ppo" / name).exists(), name
    for run, section in (("ppo", "## hydra-rlhf ppo"), ("sft", "## hydra-rlhf sft")):
        lines = (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines()
        written = {name.removeprefix("eval_") for line in lines for name in json.loads(line)}
        missing = written - documented_metrics(section) - {"stage", "step", "time"}
        assert not missing, f"docs/metrics.md says nothing of {sorted(missing)}"


def documented_metrics(section):
    page = (ROOT / "docs" / "metrics.md").read_text().split(section)[1].split("\n## ")[0]
    named = re.findall(r"`([a-z_/]+)`", "".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)))
    phases = [name for name in named if name.startswith("time/")]
    memory = {f"memory/{name[5:]}_{kind}" for name in phases for kind in ("held", "peak")}
    return {*named, *memory}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "hydra_rlhf/data/README.md"], ids=name_of)
def test_commands_are_commands(page):
    for _, text, _ in blocks(page, "bash"):
        for command, *words in commands(text):
            module = importlib.import_module(cli.COMMANDS[command][0])
            words = cli._named(command, words, getattr(module, "POSITIONALS", ()))
            assert cli.parse(command, "s", module.ARGUMENTS, words)


PAGES_WITH_LINKS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]


@pytest.mark.parametrize("page", PAGES_WITH_LINKS, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {anchor_of(title) for title in titles}, target


def anchor_of(title: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_planned_memory_in_the_readme_is_what_plan_says():
    from transformers import LlamaConfig

    from hydra_rlhf import memory
    from hydra_rlhf.config import METHODS, PPOConfig

    llama_2_7b = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )
    config = PPOConfig(response_length=256, dtype="bfloat16", gradient_checkpointing=True)
    table = (ROOT / "README.md").read_text().split("<!-- plan -->")[1].split("\n\n")[0]
    rows = {cells[1].strip(): cells[2:-1] for cells in map(split_row, table.splitlines()) if cells}
    methods = [method.strip(" `") for method in rows["GB"]]
    assert sorted(methods) == sorted(METHODS)
    for column, method in enumerate(methods):
        said = {name: cells[column].strip() for name, cells in rows.items()}
        plan = memory.plan(llama_2_7b, config, method=method, prompt_length=512)
        trained = plan.adapters + plan.gradients + plan.optimizer
        assert said["weights"] == f"{plan.weights / 1e9:.1f}"
        assert said["adapters, gradients, optimizer"] == f"{trained / 1e9:.1f}"
        assert said["peak"] == f"{plan.peak / 1e9:.1f}"
    # The command's other half, for one method: a batch more does not fit.
    most = int(rows["largest batch that fits"][methods.index("hydra-ppo")])
    sized = (
        replace(
            config,
            per_device_train_batch_size=batch,
            local_rollout_forward_batch_size=batch,
        )
        for batch in (most, most + 1)
    )
    fits, too_large = (memory.plan(llama_2_7b, s, method="hydra-ppo").peak for s in sized)
    assert fits <= 79e9 < too_large


def split_row(line: str) -> list[str]:
    return line.split("|") if line.startswith("|") else []


# Settings


@pytest.fixture(scope="module")
def settings_table():
    spec = importlib.util.spec_from_file_location(
        "settings_table", ROOT / "scripts" / "settings_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_settings_is_that_of_the_code(settings_table):
    assert settings_table.PAGE.read_text() == settings_table.page(), (
        "run python scripts/settings_table.py"
    )


def test_every_default_of_ppo_has_a_source_that_the_page_explains(settings_table):
    from hydra_rlhf.config import PPOConfig

    known = ("TRL", "PPO", "RLHF", "N+", "Hydra", "ours", "PEFT", "accelerate", "Spinning Up")
    for name, field in PPOConfig.__dataclass_fields__.items():
        found = settings_table.sources(field.metadata["help"])
        assert any(source.startswith(known) for source in found), name


def test_the_migration_page_has_our_defaults_and_real_names():
    from hydra_rlhf.config import PPOConfig

    text = (ROOT / "docs" / "from_trl.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) \|", text.split("<!-- defaults -->")[1], re.M)
    said = {name.strip("`"): ours.strip("`") for name, _, ours in rows}
    config = PPOConfig()
    assert said["stop_token"] == config.stop_token
    assert (said["gradient_checkpointing"] == "on") == config.gradient_checkpointing
    assert float(said["adam_epsilon"]) == config.adam_epsilon
    assert float(said["lora_dropout"]) == config.lora_dropout
    assert int(said["seed"]) == config.seed
    assert said["lora_r`, `lora_alpha"].startswith(f"{config.lora_r},")
    assert config.mixed_precision in said["bf16"]


# Examples: each is also a script of its own


def test_many_adapters(example):
    before, after = example("many_adapters").main(steps=5)
    assert all(b < a for a, b in zip(before, after, strict=True))


def test_own_dpo_loop(example):
    losses = example("own_dpo_loop").main(steps=5)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3), "policy is reference before the first step"
    assert losses == sorted(losses, reverse=True)


def test_own_ppo_loop(example):
    scores = example("own_ppo_loop").main(steps=2)
    assert len(scores) == 2 and all(0 < score < 1 for score in scores)


def test_custom_reward(example, tmp_path):
    scores = example("custom_reward").main(tmp_path, steps=2)
    assert len(scores) == 2 and all(0 < score < 1 for score in scores)
    assert (tmp_path / "ppo" / "actor" / "adapter_config.json").is_file()


def test_every_example_is_tested():
    source = Path(__file__).read_text()
    assert len(EXAMPLES) >= 4
    for path in EXAMPLES:
        assert f'example("{path.stem}")' in source, path.name
        assert "python examples/" in path.read_text()

"""What a run folder, a model, a data set or a key could do, and does not."""

import contextlib
import io
import json
import pickle
import shutil
import zipfile

import pytest
import torch

from hydra_rlhf import checkpoint
from hydra_rlhf.cli import main
from hydra_rlhf.errors import UserError
from hydra_rlhf.judge import KEY_VARIABLES, ChatJudge
from hydra_rlhf.rewards import ClassifierReward
from tests.rlhf.test_judge import tiny_model

KEY = "sk-0123456789abcdef"


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def command(folder, *flags):
    return [
        *("ppo", "--sft-model-path", str(folder / "model"), "--output-dir", str(folder / "run")),
        *("--prompts", str(folder / "prompts.jsonl"), "--device", "cpu", "--lora-r", "2"),
        *("--reward-fn", "security_reward:score", "--response-length", "4", "--max-steps", "2"),
        *("--per-device-train-batch-size", "2", "--num-ppo-epochs", "1", "--save-steps", "1"),
        *flags,
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with keys in the environment and paths in its data; the folder, and what it said."""
    folder = tmp_path_factory.mktemp("security")
    tiny_model(folder / "model", 0)
    (folder / "security_reward.py").write_text(
        "def score(prompts, completions, **columns):\n    return [0.5] * len(prompts)\n"
    )
    row = {"prompt": "../../outside", "file_name": "../../outside", "path": str(folder / "outside")}
    (folder / "prompts.jsonl").write_text((json.dumps(row) + "\n") * 4)
    before = {path.name for path in folder.iterdir()}
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        for name in KEY_VARIABLES:
            patch.setenv(name, KEY)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            assert main(command(folder)) == 0
    written = {path.name for path in folder.iterdir()} - before
    assert written <= {"run", "__pycache__"}
    return folder, out.getvalue()


def is_pickle(path):
    if zipfile.is_zipfile(path):
        return any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())
    return path.read_bytes()[:1] == b"\x80"


def test_a_run_folder_holds_no_pickle_but_the_optimizer_state(trained):
    files = [path for path in (trained[0] / "run").rglob("*") if path.is_file()]
    pickles = {path.name for path in files if is_pickle(path)}
    assert pickles == {"state.pt"}  # which loads with weights_only: tests/rlhf/test_checkpoint.py
    for part in ("actor", "critic"):
        names = {path.name for path in (trained[0] / "run" / part).iterdir()}
        assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for path in files:
        assert path.suffix not in (".bin", ".pkl", ".pth", ".ckpt")


def test_a_reward_function_is_said_to_be_the_users_code(trained, capsys):
    assert "security_reward:score. This runs your code" in trained[1]
    with pytest.raises(SystemExit):
        main(["ppo", "--help"])
    assert "This runs your code." in " ".join(capsys.readouterr().out.split())


def test_a_key_is_in_no_file_and_no_line(trained):
    folder, out = trained
    assert KEY not in out
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


def test_a_url_with_a_password_is_refused_unsaid():
    with pytest.raises(UserError, match="no name or password") as error:
        ChatJudge(f"https://me:{KEY}@host/v1", "m")
    assert KEY not in str(error.value)


def test_resume_runs_no_pickle(trained, tmp_path, capsys, monkeypatch):
    """Not even one whose manifest is right."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "state.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
        (folder / "manifest.json").unlink()
        checkpoint._write_manifest(folder, int(folder.name.removeprefix("step-")))
    assert main(command(tmp_path, "--resume")) == 2
    assert "cannot resume" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_adapters_and_models_run_no_pickle(trained, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    actor = tmp_path / "run" / "actor"
    (actor / "adapter_model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "ran"), actor / "adapter_model.bin")
    for path in ("run/actor", "model"):
        if path == "model":
            (tmp_path / "model" / "model.safetensors").unlink()
            torch.save(Bomb(tmp_path / "ran"), tmp_path / "model" / "pytorch_model.bin")
        flags = ["--base", str(tmp_path / "model")] if path != "model" else []
        argv = ["evaluate", "--policies", f"p={tmp_path / path}", *flags, "--device", "cpu"]
        argv += ["--prompts", str(tmp_path / "prompts.jsonl"), "--response-length", "4"]
        assert main(argv) != 0
        assert not (tmp_path / "ran").exists()
    capsys.readouterr()


@pytest.fixture
def remote(tmp_path):
    """A model that comes with code, which leaves a file when it is imported."""
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    classes = {
        name: "code.Thing"
        for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    }
    config = {"model_type": "unheard-of", "auto_map": classes, "architectures": ["Thing"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "Thing", "auto_map": {"AutoTokenizer": ["code.Thing", None]}}
        )
    )
    yield folder
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["sft", "ppo", "evaluate", "plan"])
def test_remote_code_is_off(remote, tmp_path, name, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked instead of refusing"))
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    data, out = str(tmp_path / "d.jsonl"), str(tmp_path / "out")
    flags = {
        "sft": ["--model", str(remote), "--pair-data", data, "--output-dir", out],
        "ppo": ["--sft-model-path", str(remote), "--prompts", data, "--output-dir", out],
        "evaluate": ["--policies", f"p={remote}", "--prompts", data],
        "plan": ["--model", str(remote)],
    }[name]
    assert main([name, *flags]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_remote_code_of_a_reward_model_is_off(remote):
    with pytest.raises(UserError, match="cannot load a reward model"):
        ClassifierReward(remote)

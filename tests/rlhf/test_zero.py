"""Under DeepSpeed, by ``accelerate launch``, two processes make the update of one."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hydra_rlhf import processes, zero
from hydra_rlhf.checkpoint import CheckpointStore, load_state
from hydra_rlhf.errors import UserError
from tests.rlhf.test_distributed import assert_same_run, outcome, same_sft
from tests.rlhf.two_processes import SFT_RUNS, figures, prepare_sft, run
from tests.rlhf.under_deepspeed import METHODS

# What ``accelerate config`` writes, with its defaults for DeepSpeed.
LAUNCH = """
compute_environment: LOCAL_MACHINE
debug: false
deepspeed_config:
  gradient_accumulation_steps: 1
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: false
  zero_stage: 2
distributed_type: DEEPSPEED
downcast_bf16: 'no'
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
main_process_port: 0
rdzv_backend: static
same_network: true
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Hydra-PPO by one process."""
    folder = tmp_path_factory.mktemp("one")
    result, trained = run("hydra-ppo", 1, folder)
    return SimpleNamespace(folder=folder, result=result, trained=trained)


@pytest.fixture(scope="module")
def two(tmp_path_factory, one):
    pytest.importorskip("deepspeed", reason="DeepSpeed has no wheel here and cannot be built")
    folder = tmp_path_factory.mktemp("zero")
    (folder / "launch.yaml").write_text(LAUNCH)
    shutil.copytree(one.folder, folder / "one")
    prepare_sft(folder)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
            *("--config_file", str(folder / "launch.yaml")),
            *("-m", "tests.rlhf.under_deepspeed", str(folder)),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.getcwd(),
            "TORCH_EXTENSIONS_DIR": str(folder / "compiled"),
        },
    )
    assert done.returncode == 0, done.stderr[-9000:]
    (folder / "said").write_text(done.stdout)
    return folder


def told(folder, index):
    return json.loads((folder / f"told-{index}.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_make_the_update_of_one(two, one, method):
    result, trained = one.result, one.trained
    if method != "hydra-ppo":
        result, trained = run(method, 1, **METHODS[method][0])
    assert_same_run(outcome(two, method, 0), result.metrics, trained)
    for name, value in outcome(two, method, 0)[1].items():
        assert torch.equal(value, outcome(two, method, 1)[1][name])


def test_resume_from_one_process_to_two(two, tmp_path):
    """And from the checkpoint of two to one, which has no DeepSpeed."""
    shutil.copytree(two / "hydra-ppo", tmp_path / "too")
    whole, trained = run("hydra-ppo", 1, max_steps=3)
    assert_same_run(outcome(two, "resumed", 0), whole.metrics[2:], trained)
    again, trained_again = run("hydra-ppo", 1, tmp_path / "too", resume=True, max_steps=3)
    assert again.first_step == 3
    assert_same_run(
        ([figures(m) for m in again.metrics], trained_again), whole.metrics[2:], trained
    )


def test_a_checkpoint_is_that_of_a_run_without_deepspeed(two, one):
    folders = two / "hydra-ppo", one.folder
    found, expected = (CheckpointStore(f / "checkpoints").latest() for f in folders)
    files = [sorted(p.relative_to(c.path) for p in c.path.rglob("*")) for c in (found, expected)]
    assert files[0] == files[1]
    ours, theirs = (load_state(c.path)["optimizer"] for c in (found, expected))
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        assert ours["state"][number].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(ours["state"][number][name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", SFT_RUNS)
def test_two_processes_make_the_sft_of_one(two, name, tmp_path):
    same_sft(two, two / f"sft-{name}", name, tmp_path)


def test_the_command_leaves_a_whole_run(two):
    folder = two / "command"
    assert CheckpointStore(folder / "checkpoints").latest().step == 2
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]  # one process writes
    assert (folder / "report.html").stat().st_size > 10_000
    base = AutoModelForCausalLM.from_pretrained(two / "sft-hydra" / "model")
    policy = PeftModel.from_pretrained(base, folder / "actor")
    assert any(p.abs().sum() > 0 for n, p in policy.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("stage", ["1", "2"])
@pytest.mark.parametrize("index", [0, 1])
def test_an_optimizer_that_is_split(two, index, stage):
    found = told(two, index)
    assert found[f"steps-{stage}"] <= 1e-6
    assert found[f"continued-{stage}"]


@pytest.mark.parametrize("index", [0, 1])
def test_each_process_holds_half_of_the_moments(two, index):
    here, every = told(two, index)["held"]
    # Shares are whole multiples of two elements: at most 3 of padding in each of three parts.
    assert every <= 2 * here <= every + 2 * 3 * 3


def test_nothing_is_compiled_and_deepspeed_is_quiet(two):
    assert not (two / "compiled").exists()
    assert "[INFO]" not in (two / "said").read_text()


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: SimpleNamespace())


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("DEEPSPEED_ZERO_STAGE", "3", "ZeRO 3.*--fsdp_version 2"),
        ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu", "offload_param to cpu needs ZeRO 3"),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "nvme", "offload_optimizer to nvme needs ZeRO 3"),
        ("GRADIENT_CLIPPING", "0.3", "gradient_clipping, which --max-grad-norm"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps, which"),
    ],
)
def test_refuses_what_does_not_work_here(asked, monkeypatch, name, value, message):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=message):
        processes.make_accelerator()


@pytest.mark.parametrize(
    "section, message",
    [
        ({"optimizer": {"type": "AdamW"}}, "sets optimizer, which --learning-rate"),
        ({"scheduler": {"type": "WarmupLR"}}, "sets scheduler"),
        ({"train_batch_size": 32}, "sets train_batch_size"),
        ({"bf16": {"enabled": True}}, "sets bf16, which --mixed-precision"),
        ({"zero_optimization": {"stage": 3}}, "ZeRO 3"),
        ("{", "configuration: "),
    ],
)
def test_refuses_a_file_of_deepspeed(asked, monkeypatch, tmp_path, section, message):
    file = tmp_path / "ds.json"
    whole = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}
    file.write_text(section if isinstance(section, str) else json.dumps(whole | section))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(UserError, match=message):
        processes.make_accelerator()


def test_a_file_of_deepspeed_is_handed_on(asked, monkeypatch, tmp_path):
    file = tmp_path / "ds.json"
    buckets = {"reduce_bucket_size": 1000, "allgather_bucket_size": "auto"}
    given = {"zero_optimization": {"stage": 1, **buckets}, "fp16": {"enabled": "auto"}}
    file.write_text(json.dumps(given | {"gradient_clipping": "auto", "wall_clock_breakdown": True}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    found = zero.read_settings()
    expected = {"stage": 1, "reduce_bucket_size": 1000, "round_robin_gradients": False}
    assert found["zero_optimization"] == expected
    assert found["wall_clock_breakdown"] is True
    assert "fp16" not in found and found["gradient_clipping"] == 0.0


def test_says_that_deepspeed_is_not_installed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'hydra-rlhf\[deepspeed\]'"):
        processes.make_accelerator()


def test_an_accelerator_of_deepspeeds_own_kind_is_refused():
    other = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, num_processes=2)
    with pytest.raises(UserError, match="make_accelerator"):
        processes.Processes(other)

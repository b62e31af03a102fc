"""Two processes with half the batch each make the update of one with all of it."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.utils import DistributedType, patch_environment
from safetensors.torch import load_file

from hydra_rlhf import trunk as trunks
from hydra_rlhf.checkpoint import CheckpointStore
from hydra_rlhf.errors import UserError
from hydra_rlhf.pretrained import load_causal_lm
from hydra_rlhf.processes import Processes, make_accelerator
from hydra_rlhf.schedule import minibatches, sampling_seeds
from tests.rlhf.families import batch, make_lm
from tests.rlhf.test_ppo import plain_model, settings
from tests.rlhf.two_processes import (
    CAN_RECOVER,
    OUT_OF_MEMORY,
    RUNS,
    SFT_RUNS,
    SHARDED,
    begin_sft,
    figures,
    prepare_sft,
    run,
    run_sft,
    sft_outcome,
)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run("hydra-ppo", 1, folder / "one")
    shutil.copytree(folder / "one", folder / "too")
    prepare_sft(folder)
    begin_sft("hydra", folder, folder / "sft-begun")
    begin_sft("lora", folder, folder / "sft-begun-lora")
    done = subprocess.run(
        [
            # What accelerate launch starts for GPUs; on a CPU that itself would want an MPI.
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--standalone", "-m", "tests.rlhf.two_processes", str(folder)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr[:9000]
    return folder


def outcome(folder, name, index):
    with open(folder / f"{name}-{index}.json") as file:
        return json.load(file), load_file(folder / f"{name}-{index}.safetensors")


def assert_same_run(found, metrics, trained):
    found_metrics, found_trained = found
    assert len(found_metrics) == len(metrics)
    for ours, theirs in zip(found_metrics, metrics, strict=True):
        theirs = figures(theirs)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name
    assert found_trained.keys() == trained.keys()
    for name, value in trained.items():
        torch.testing.assert_close(found_trained[name], value, atol=1e-6, rtol=0.0, msg=name)


@pytest.mark.parametrize("method", RUNS)
def test_two_processes_make_the_update_of_one(two, method):
    result, trained = run(method, 1)
    assert_same_run(outcome(two, method, 0), result.metrics, trained)
    metrics, mine = outcome(two, method, 1)
    assert metrics == outcome(two, method, 0)[0]
    for name, value in outcome(two, method, 0)[1].items():
        assert torch.equal(value, mine[name])  # both processes hold the very same weights


@pytest.mark.parametrize("method", RUNS)
def test_only_what_is_trained_is_summed(two, method):
    """Once an update; all else that is summed is a few figures."""
    _, trained = outcome(two, method, 0)
    total = sum(value.numel() for value in trained.values())
    config = settings()
    updates = 2 * config.num_ppo_epochs * config.num_mini_batches
    for index in range(2):
        sizes = json.loads((two / f"summed-{index}.json").read_text())[method]
        large = [size for size in sizes if size > 100]
        assert len(large) == updates and max(large) == total
        if method != "hydra-ppo":  # whose critic alone is trained at first
            assert min(large) == total


def test_generators_are_each_processs_own_and_weights_the_firsts(two):
    (first, given), (other, taken) = (
        json.loads((two / f"drawn-{index}.json").read_text()) for index in range(2)
    )
    assert first[0] != other[0] and first[1] != other[1]
    assert given == taken == [0.0, 0.0, 0.0]


def test_resume_from_one_process_to_two(two):
    """And from the checkpoint of two to one."""
    whole, trained = run("hydra-ppo", 1, max_steps=3)
    assert_same_run(outcome(two, "resumed", 0), whole.metrics[2:], trained)
    newest = CheckpointStore(two / "hydra-ppo" / "checkpoints").latest()
    assert newest.step == 2
    again, trained_again = run("hydra-ppo", 1, two / "hydra-ppo", resume=True, max_steps=3)
    assert again.first_step == 3
    found = [figures(m) for m in again.metrics], trained_again
    assert_same_run(found, whole.metrics[2:], trained)


def test_resume_refuses_another_batch(two):
    with pytest.raises(UserError, match="step was of 8 sequences and is of 4"):
        run("hydra-ppo", 2, two / "one", resume=True)


def test_minibatches_do_not_depend_on_the_processes():
    def positions(count):
        parts = []
        for index in range(count):
            these = SimpleNamespace(
                index=index,
                count=count,
                share=lambda n, i=index, c=count: slice(i * n // c, (i + 1) * n // c),
            )
            generator = torch.Generator().manual_seed(5)
            local = minibatches(24 // count, 3, these, generator)
            assert [len(rows) for rows in local] == [8 // count] * 3
            parts.append([rows + index * 24 // count for rows in local])
        return [sorted(torch.cat(rows).tolist()) for rows in zip(*parts, strict=True)]

    whole = positions(1)
    assert sorted(sum(whole, [])) == list(range(24))
    assert positions(2) == positions(4) == whole


def test_seeds_of_a_step():
    first = sampling_seeds(3, 1, 512)
    assert len(set(first)) == 512
    assert not set(first) & set(sampling_seeds(3, 2, 512))
    assert first[:8] == sampling_seeds(3, 1, 8)


@pytest.mark.parametrize("method", SHARDED)
def test_two_processes_that_share_the_frozen_weights_make_the_update_of_one(two, method):
    result, trained = run(method, 1, **SHARDED[method])
    assert_same_run(outcome(two, f"sharded-{method}", 0), result.metrics, trained)
    for name, value in outcome(two, f"sharded-{method}", 1)[1].items():
        assert torch.equal(value, outcome(two, f"sharded-{method}", 0)[1][name])


def told(folder, index):
    with open(folder / f"sharded-{index}.json") as file:
        return json.load(file)


@pytest.mark.parametrize("method", SHARDED)
def test_each_process_holds_half_of_what_is_frozen(two, method):
    models = run(method, 1, **SHARDED[method], max_steps=1)[0].models
    for i, model in enumerate(models):
        blocks = trunks.blocks(model.trunk)
        frozen = sum(p.nbytes for n, p in blocks.named_parameters() if "lora_" not in n)
        every = sum(p.nbytes for p in model.trunk.parameters())
        for index in range(2):
            here, total = told(two, index)["held"][method][i]
            assert total == every
            assert here == every - frozen // 2  # every matrix and vector here splits evenly


def test_resume_of_one_process_by_two_that_share_the_weights(two):
    """A checkpoint knows nothing of how the frozen weights were held, in both directions."""
    whole, trained = run("hydra-ppo", 1, max_steps=3)
    assert_same_run(outcome(two, "sharded-resumed", 0), whole.metrics[2:], trained)
    changes = dict(resume=True, max_steps=3)
    again, trained_again = run("hydra-ppo", 1, two / "sharded-hydra-ppo", **changes)
    assert again.first_step == 3
    found = [figures(m) for m in again.metrics], trained_again
    assert_same_run(found, whole.metrics[2:], trained)


@pytest.mark.parametrize("index", [0, 1])
def test_sampling_goes_on_until_the_slowest_process_is_done(two, index):
    tokens = load_file(two / f"tokens-{index}.safetensors")
    ids, _, _ = batch()
    for engine in ("hydra", "transformers"):
        assert torch.equal(tokens[engine], tokens[f"whole-{engine}"])
        drawn = tokens[engine].shape[1] - ids.shape[1]
        assert drawn == 1 if index == 0 else drawn > 1


@pytest.mark.skipif(not CAN_RECOVER, reason="torch's FSDP has no reset_iter_state")
def test_out_of_memory_in_one_process_halves_in_both(two):
    """And what the other process gathers meanwhile it still gets."""
    result, trained = run("hydra-ppo", 1, **{**OUT_OF_MEMORY, "per_device_train_batch_size": 8})
    assert_same_run(outcome(two, "sharded-out-of-memory", 0), result.metrics, trained)
    for index in range(2):
        said = [line for line in told(two, index)["told"] if "out of GPU memory" in line]
        assert [line.split("with ")[1].split(":")[0] for line in said] == [
            "local_rollout_forward_batch_size 4",
            "per_device_train_batch_size 4",
            "per_device_train_batch_size 2",
        ]


def test_a_sharded_model_is_saved_whole(two):
    saved = transformers.AutoModelForCausalLM.from_pretrained(two / "gathered").state_dict()
    for name, value in plain_model().causal_lm.state_dict().items():
        assert torch.equal(saved[name], value), name


@pytest.mark.parametrize("split", ["", "sharded-"], ids=["whole", "sharded"])
@pytest.mark.parametrize("name", SFT_RUNS)
def test_two_processes_make_the_sft_of_one(two, name, split, tmp_path):
    same_sft(two, two / f"{split}sft-{name}", name, tmp_path)


@pytest.mark.parametrize("name", ["sft-begun", "sft-begun-lora"], ids=["whole", "sharded-lora"])
def test_two_processes_go_on_with_the_sft_of_one(two, name, tmp_path):
    same_sft(two, two / name, "lora" if name.endswith("lora") else "hydra", tmp_path)


@pytest.mark.parametrize("split", ["", "sharded-"], ids=["whole", "sharded"])
def test_a_bad_update_of_one_process_is_skipped_by_both(two, split):
    metrics, weights = sft_outcome(two / f"{split}sft-bad")
    assert [line["bad_updates"] for line in metrics] == [0, 1, 0, 0]
    assert [line["loss"] is None for line in metrics] == [False, True, False, False]
    assert all(weight.isfinite().all() for weight in weights.values())


def same_sft(folder, run_dir, name, tmp_path):
    """``run_dir`` is that of the run ``name`` by two processes; ``folder`` has what it needs."""
    metrics, weights = run_sft(name, folder, tmp_path / "run")
    found_metrics, found = sft_outcome(run_dir)
    assert len(metrics) == len(found_metrics) == 4
    for ours, theirs in zip(found_metrics, metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs.keys() - {"tokens_per_s", "time", "stage"}:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5, rel=1e-5), key
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        # Adam divides by the gradient's own size: where that nearly cancels, a weight moves by more
        # than the rounding that the processes' sum differs by. Measured: one of 2000 by 3.1e-6, of
        # steps of 1e-2; a norm below that of one such weight would be another limit.
        gap = (found[key] - value).abs()
        assert gap.norm() <= 5e-6 + 1e-6 * value.norm() and gap.max() <= 5e-6, key


def launched(kind):
    return SimpleNamespace(distributed_type=kind, num_processes=2, state=SimpleNamespace())


@pytest.mark.parametrize(
    "kind, instead",
    [
        (DistributedType.MEGATRON_LM, "Megatron-LM.*--multi_gpu"),
        (DistributedType.XLA, "XLA"),
    ],
)
def test_refuses_what_splits_the_models_otherwise(kind, instead):
    with pytest.raises(UserError, match=instead):
        Processes(launched(kind))


@pytest.mark.parametrize("command", ["sft", "ppo"])
def test_a_launch_that_is_not_supported_is_named_whatever_is_installed(command, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(UserError, match="not run under Megatron-LM"):
        if command == "ppo":
            run("hydra-ppo", 1)
        else:
            make_accelerator("cpu")


@pytest.mark.parametrize(
    "environment, message",
    [
        (dict(fsdp_version="1"), "--fsdp_version 2"),
        (dict(fsdp_version="2", fsdp_activation_checkpointing="true"), "--gradient-checkpointing"),
    ],
)
def test_refuses_settings_of_fsdp_that_do_not_work_here(environment, message):
    with patch_environment(accelerate_use_fsdp="true", **environment):
        with pytest.raises(UserError, match=message):
            Processes(launched(DistributedType.FSDP))


def test_every_process_loads_the_weights_itself(tmp_path, monkeypatch):
    """transformers leaves all but one without under accelerate's default for FSDP."""
    make_lm("llama").save_pretrained(tmp_path)
    seen = []
    real = transformers.AutoModelForCausalLM.from_pretrained

    def load(*args, **kwargs):
        seen.append(os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"])
        return real(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    load_causal_lm(tmp_path)
    assert seen == ["false"]
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"

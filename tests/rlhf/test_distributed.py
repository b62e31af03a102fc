"""Two processes with half the batch each make the update of one with all of it."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

from hydra_rlhf import ppo
from hydra_rlhf.checkpoint import CheckpointStore
from hydra_rlhf.errors import UserError
from hydra_rlhf.processes import Processes
from hydra_rlhf.schedule import minibatches, sampling_seeds
from tests.rlhf.families import PROMPTS, make_tokenizer
from tests.rlhf.test_ppo import plain_model, settings, word_reward

# What is summed over processes: whitening, moments, the adaptive coefficient, early stops, norms.
RUNS = {
    "hydra-ppo": dict(
        kl_controller="adaptive",
        kl_target=0.01,
        kl_horizon=50.0,
        use_score_scaling=True,
        use_score_norm=True,
        whiten_rewards=True,
        max_grad_norm=0.05,
        gradient_accumulation_steps=2,
        critic_warmup_steps=1,
        target_kl=0.5,
        eval_steps=2,
    ),
    # Shared prefix and per-row adapter ids.
    "j-hydra-ppo": dict(lora_last_k=1, batched_score="yes", kl_estimator="exact"),
    "d-lora-ppo": dict(lora_last_k=1, rollout_logprobs="reuse"),
}
WHOLE = 4  # sequences of a microbatch with one process


def run(method, processes, folder=None, resume=False, **changes):
    config = settings(
        method=method,
        per_device_train_batch_size=WHOLE // processes,
        max_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",  # the same for a run that is longer
        save_steps=1,
        **RUNS[method],
    )
    for name, value in changes.items():
        setattr(config, name, value)
    result = ppo.train(
        config,
        plain_model(),
        make_tokenizer(),
        PROMPTS,
        reward_fn=word_reward if method == "d-lora-ppo" else None,
        eval_prompts=PROMPTS[:3],  # one process has two of them
        run_dir=folder,
        resume=resume,
    )
    names = [*result.models.actor_parameters(), *result.models.critic_parameters()]
    return result, {f"{i:03d}": p.detach().contiguous() for i, p in enumerate(names)}


def figures(metrics):
    """Without what is of one process: its clock, its memory, and the padding it did not compute."""
    of_one = ("time/", "memory/", "perf/", "reuse/")
    return {k: v for k, v in metrics.items() if not k.startswith(of_one)}


def worker(folder):
    """What each of the two processes does: every run, and one that another process began."""
    index = Accelerator(cpu=True).process_index
    for name in [*RUNS, "resumed"]:
        if name == "resumed":
            result, trained = run("hydra-ppo", 2, f"{folder}/one", resume=True, max_steps=3)
        else:
            result, trained = run(name, 2, f"{folder}/{name}")
        save_file(trained, f"{folder}/{name}-{index}.safetensors")
        with open(f"{folder}/{name}-{index}.json", "w") as file:
            json.dump([figures(m) for m in result.metrics], file)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run("hydra-ppo", 1, folder / "one")
    done = subprocess.run(
        [
            # What accelerate launch starts for GPUs; on a CPU that itself would want an MPI.
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--standalone", "-m", "tests.rlhf.test_distributed", str(folder)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr[-3000:]
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


@pytest.mark.parametrize(
    "kind, name", [(DistributedType.FSDP, "FSDP"), (DistributedType.DEEPSPEED, "DeepSpeed")]
)
def test_refuses_what_splits_the_models(kind, name):
    with pytest.raises(UserError, match=f"cannot run under {name}"):
        Processes(SimpleNamespace(distributed_type=kind))


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(sys.argv[1])

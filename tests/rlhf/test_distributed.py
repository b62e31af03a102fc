"""Two processes with half the batch each make the update of one with all of it."""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, patch_environment
from safetensors.torch import load_file, save_file

from hydra_rlhf import experience, ppo, update
from hydra_rlhf import trunk as trunks
from hydra_rlhf.checkpoint import CheckpointStore
from hydra_rlhf.errors import UserError
from hydra_rlhf.experience import Sampler
from hydra_rlhf.pretrained import load_causal_lm
from hydra_rlhf.processes import Processes
from hydra_rlhf.rollout import Sampling
from hydra_rlhf.schedule import minibatches, sampling_seeds
from hydra_rlhf.sharding import held_bytes
from tests.rlhf.families import (
    EOS,
    PAD,
    PROMPTS,
    VOCAB,
    batch,
    make_lm,
    make_model,
    make_tokenizer,
)
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
# With what is frozen split over the two. Sampling with and without the whole model, by both loops;
# recomputed blocks; models that hold no adapters at all.
SHARDED = {
    "hydra-ppo": dict(gather_for_generation=False),
    "j-hydra-ppo": {},
    "d-lora-ppo": dict(gradient_checkpointing=True),
    "lora-ppo": dict(gradient_checkpointing=True, use_reentrant=True, eval_steps=1),
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
        **RUNS.get(method, {}),
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

    def keep(name, result, trained):
        save_file(trained, f"{folder}/{name}-{index}.safetensors")
        with open(f"{folder}/{name}-{index}.json", "w") as file:
            json.dump([figures(m) for m in result.metrics], file)

    for name in RUNS:
        keep(name, *run(name, 2, f"{folder}/{name}"))
    keep("resumed", *run("hydra-ppo", 2, f"{folder}/one", resume=True, max_steps=3))
    tokens = {f"whole-{name}": t for name, t in tokens_of_uneven_lengths(index).items()}
    with sharded():
        held = {}
        for name, changes in SHARDED.items():
            result, trained = run(name, 2, f"{folder}/sharded-{name}", **changes)
            keep(f"sharded-{name}", result, trained)
            held[name] = [held_bytes(model.trunk) for model in result.models]
        keep("sharded-resumed", *run("hydra-ppo", 2, f"{folder}/too", resume=True, max_steps=3))
        tokens |= tokens_of_uneven_lengths(index)
        save_file(tokens, f"{folder}/tokens-{index}.safetensors")
        with memory_runs_out(index) as told:
            keep("sharded-out-of-memory", *run("hydra-ppo", 2, **OUT_OF_MEMORY))
        result.models.actor.save_pretrained(f"{folder}/gathered")
        with open(f"{folder}/sharded-{index}.json", "w") as file:
            json.dump({"held": held, "told": told}, file)


def sharded():
    """As ``accelerate launch --use_fsdp --fsdp_version 2``, whose launcher sets these."""
    return patch_environment(accelerate_use_fsdp="true", fsdp_version="2")


def tokens_of_uneven_lengths(index):
    """Responses of both loops where one process's end at the first token and the other's do not."""
    processes = Processes(Accelerator(cpu=True))
    model = make_model("llama", trained=True)
    if processes.sharding is not None:
        processes.sharding.shard(model)
    ids, mask, _ = batch()
    stops = tuple(range(2, VOCAB)) if index == 0 else (EOS,)
    sampling = Sampling(5, 0.8, stops, PAD)
    out = {}
    for engine in ("hydra", "transformers"):
        config = settings(rollout_engine=engine, gather_for_generation=False)
        torch.manual_seed(index)
        sampler = Sampler(config, sampling, processes)
        rollout = sampler(model, ids, mask, role="actor", with_logprobs=False, seeds=[5, 6, 7, 8])
        out[engine] = rollout.query_responses.contiguous()
    return out


OUT_OF_MEMORY = dict(
    max_steps=1, per_device_train_batch_size=4, local_rollout_forward_batch_size=4, eval_steps=0
)


@contextlib.contextmanager
def memory_runs_out(index):
    """In the first process while it scores, in the second within an update's forward and backward.

    Yields the warnings, in order.
    """
    mlp = transformers.models.llama.modeling_llama.LlamaMLP
    forward, told, armed = mlp.forward, [], {}

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def failing(self, x):
        out = forward(self, x)
        armed["calls"] = armed.get("calls", 0) + 1
        if armed["calls"] == armed.get("forward"):
            fail()
        if armed["calls"] == armed.get("backward"):
            out.register_hook(fail)
        return out

    def arm(name, function, attempts):
        def run(*args, **kwargs):
            armed.clear()
            if kwargs.get("most") is None and attempts:
                armed.update(attempts.pop(0))
            return function(*args, **kwargs)

        return mock.patch(name, run)

    class Keep(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logging.getLogger("hydra_rlhf").addHandler(handler)
    # Calls of two blocks: the second pass's first block; the first block of a later microbatch.
    scoring = [{"forward": 3}] if index == 0 else []
    updates = [{"forward": 2}, {"backward": 5}] if index == 1 else []
    with (
        mock.patch.object(mlp, "forward", failing),
        arm("hydra_rlhf.experience.score_by", experience.score_by, scoring),
        arm("hydra_rlhf.update.update_minibatch", update.update_minibatch, updates),
    ):
        yield told
    assert not scoring and not updates
    logging.getLogger("hydra_rlhf").removeHandler(handler)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run("hydra-ppo", 1, folder / "one")
    shutil.copytree(folder / "one", folder / "too")
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


def launched(kind):
    return SimpleNamespace(distributed_type=kind, num_processes=2, state=SimpleNamespace())


@pytest.mark.parametrize(
    "kind, instead",
    [
        (DistributedType.DEEPSPEED, "DeepSpeed.*ZeRO 3 .*--fsdp_version 2"),
        (DistributedType.MEGATRON_LM, "Megatron-LM.*--multi_gpu"),
        (DistributedType.XLA, "XLA"),
    ],
)
def test_refuses_what_splits_the_models_otherwise(kind, instead):
    with pytest.raises(UserError, match=instead):
        Processes(launched(kind))


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(sys.argv[1])

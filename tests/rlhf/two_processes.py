"""What two processes do for test_distributed, and one alone for comparison.

As a program, started in each of two processes: every run, with the weights whole and split.
"""

import contextlib
import json
import logging
import math
import random
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import patch_environment
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule

from hydra_rlhf import experience, ppo, update
from hydra_rlhf.commands import sft as sft_command
from hydra_rlhf.commands.inputs import TrainingOutput
from hydra_rlhf.experience import Sampler
from hydra_rlhf.pair_loss import PairLoss
from hydra_rlhf.processes import Processes
from hydra_rlhf.rollout import Sampling
from hydra_rlhf.sft import Trainer
from hydra_rlhf.sft_config import SFTConfig
from hydra_rlhf.sharding import held_bytes
from tests.rlhf.families import EOS, PAD, PROMPTS, VOCAB, batch, make_lm, make_model, make_tokenizer
from tests.rlhf.test_ppo import plain_model, settings, word_reward

# What is summed over processes: whitening, moments, the adaptive coefficient, early stops, norms.
# A pass that was broken off can be made again; torch 2.11's FSDP cannot.
CAN_RECOVER = hasattr(FSDPModule, "reset_iter_state")
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

    summed = {}
    for name in RUNS:
        with sums() as summed[name]:
            keep(name, *run(name, 2, f"{folder}/{name}"))
    Path(f"{folder}/summed-{index}.json").write_text(json.dumps(summed))
    given = torch.full((3,), float(index))
    drawn = random.random(), float(torch.rand(()))
    Processes(Accelerator(cpu=True)).broadcast([given])
    Path(f"{folder}/drawn-{index}.json").write_text(json.dumps([drawn, given.tolist()]))
    keep("resumed", *run("hydra-ppo", 2, f"{folder}/one", resume=True, max_steps=3))
    for name in SFT_RUNS:
        run_sft(name, folder, f"{folder}/sft-{name}")
    go_on("hydra", folder, f"{folder}/sft-begun")
    with bad_update(index):
        run_sft("lora", folder, f"{folder}/sft-bad")
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
        told = None
        if CAN_RECOVER:
            with memory_runs_out(index) as told:
                keep("sharded-out-of-memory", *run("hydra-ppo", 2, **OUT_OF_MEMORY))
        result.models.actor.save_pretrained(f"{folder}/gathered")
        for name in SFT_RUNS:
            run_sft(name, folder, f"{folder}/sharded-sft-{name}")
        go_on("lora", folder, f"{folder}/sft-begun-lora")
        with bad_update(index):
            run_sft("sft", folder, f"{folder}/sharded-sft-bad")
        with open(f"{folder}/sharded-{index}.json", "w") as file:
            json.dump({"held": held, "told": told}, file)


@contextlib.contextmanager
def sums():
    """Yields the elements of each tensor that is summed over the processes, in order."""
    found, real = [], torch.distributed.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        found.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    with mock.patch("torch.distributed.all_reduce", all_reduce):
        yield found


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


# One process has two microbatches of a batch and the other one; of the last batch one has none.
_SFT = dict(batch_size=3, micro_batch_size=1, epochs=1.0, learning_rate=1e-2, max_grad_norm=0.5)
SFT_RUNS = {
    "hydra": dict(objective="hydra", weight_decay=0.1, eval_every=1),
    "lora": dict(objective="hydra", lora_r=4, gradient_checkpointing=True),
    "sft": dict(objective="sft", gradient_checkpointing=True),
    "dpo": dict(objective="dpo", lora_r=4),
}


def prepare_sft(folder):
    """A model, its tokenizer and 10 pairs, of which the last batch has one."""
    make_lm("llama", num_hidden_layers=2).save_pretrained(folder / "start")
    make_tokenizer().save_pretrained(folder / "start")
    rows = [
        {"prompt": prompt, "chosen": f" w{3 + i} w{20 + i}", "rejected": " w9" * (1 + i % 4)}
        for i, prompt in enumerate(PROMPTS[:10])
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))


def begin_sft(name, folder, out):
    """All of a run's steps but the last, by this process: what it made of that is taken away."""
    run_sft(name, folder, out, save_steps=3)
    shutil.rmtree(Path(out) / "model")


def go_on(name, folder, out):
    """The rest of a run by two processes."""
    steps = []
    with mock.patch.object(Trainer, "step", _told(Trainer.step, steps)):
        run_sft(name, folder, out, resume=True)
    assert len(steps) == 1


def _told(function, calls):
    def call(*args):
        calls.append(args)
        return function(*args)

    return call


@contextlib.contextmanager
def bad_update(index):
    """The loss of the second step is no number in the second process, which has a part of it."""
    forward, steps = PairLoss.forward, []

    def bad(self, batch):
        sums = forward(self, batch)
        factor = math.nan if index == 1 and len(steps) == 2 else 1.0
        return {name: value * factor for name, value in sums.items()}

    told = mock.patch.object(Trainer, "step", _told(Trainer.step, steps))
    with told, mock.patch.object(PairLoss, "forward", bad):
        yield


def run_sft(name, folder, out, resume=False, **changes):
    """``hydra-rlhf sft``; what it wrote that says what was trained: weights and records."""
    given = sft_command.SFTInput(
        f"{folder}/start", pair_data=f"{folder}/pairs.jsonl", eval_data=f"{folder}/pairs.jsonl"
    )
    config = SFTConfig(**_SFT, **SFT_RUNS[name], **changes)
    output = TrainingOutput(output_dir=str(out), device="cpu", resume=resume)
    sft_command.run(given, config, output)
    return sft_outcome(out)


def sft_outcome(out):
    weights = {}
    files = sorted(Path(out).rglob("*.safetensors"))
    for file in (f for f in files if "checkpoints" not in f.parts):
        weights.update({f"{file.name}:{n}": t for n, t in load_file(file).items()})
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], weights


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(sys.argv[1])

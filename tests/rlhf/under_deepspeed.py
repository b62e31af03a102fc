"""What two processes do for test_zero, started by ``accelerate launch`` with DeepSpeed."""

import copy
import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from safetensors.torch import save_file

from hydra_rlhf import cli
from hydra_rlhf.processes import Processes, make_accelerator
from tests.rlhf.two_processes import SFT_RUNS, figures, run, run_sft

# Every method; both stages, weight decay, and state that is kept on the CPU.
METHODS = {
    "hydra-ppo": (dict(), dict()),
    "j-hydra-ppo": (dict(weight_decay=0.1), dict(zero_stage="1")),
    "d-lora-ppo": (dict(), dict(offload_optimizer_device="cpu")),
    "lora-ppo": (dict(gradient_checkpointing=True), dict()),
    "ppo": (dict(weight_decay=0.1), dict(zero_stage="1", offload_optimizer_device="cpu")),
}


def settings(**changes):
    """As ``--zero_stage`` and its like, which the launcher hands on in these."""
    return patch_environment(**{f"accelerate_deepspeed_{k}": v for k, v in changes.items()})


def worker(folder):
    accelerator = make_accelerator()
    index = accelerator.process_index

    def keep(name, result, trained):
        save_file(trained, f"{folder}/{name}-{index}.safetensors")
        with open(f"{folder}/{name}-{index}.json", "w") as file:
            json.dump([figures(m) for m in result.metrics], file)

    for name, (changes, zero) in METHODS.items():
        with settings(**zero):
            keep(name, *run(name, 2, f"{folder}/{name}", **changes))
    keep("resumed", *run("hydra-ppo", 2, f"{folder}/one", resume=True, max_steps=3))
    for name in SFT_RUNS:
        run_sft(name, folder, f"{folder}/sft-{name}")
    command = ["ppo", "--sft-model-path", f"{folder}/sft-hydra/model", "--save-steps", "2"]
    command += ["--prompts", f"{folder}/pairs.jsonl", "--output-dir", f"{folder}/command"]
    command += ["--max-steps", "2", "--response-length", "4", "--mixed-precision", "bf16"]
    command += ["--per-device-train-batch-size", "2", "--num-mini-batches", "1"]
    AcceleratorState._reset_state()  # which would keep the precision of the runs before
    assert cli.main(command) == 0
    found = {"held": held(accelerator)}
    for stage in ("1", "2"):
        with settings(zero_stage=stage):
            found[f"continued-{stage}"] = continued(accelerator)
            found[f"steps-{stage}"] = steps(accelerator)
    Path(f"{folder}/told-{index}.json").write_text(json.dumps(found))


def parameters():
    """Two groups of odd sizes, so that shares cut through matrices; one has two dtypes."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((7, 5), (3,), (1,), (4, 9)), ((11,), (2, 3, 5))
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16), (torch.float32,) * 2
    return [
        [
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape, dtype in zip(group, kinds, strict=True)
        ]
        for group, kinds in zip(shapes, dtypes, strict=True)
    ]


def make(groups):
    rates = (1e-2, 3e-3)
    return torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in zip(groups, rates, strict=True)],
        weight_decay=0.1,
        fused=True,
    )


def give_gradients(groups, step, *, leave=()):
    """The same in every process, as they are once summed; none to the groups ``leave``."""
    generator = torch.Generator().manual_seed(100 + step)
    for i, group in enumerate(groups):
        for parameter in group:
            drawn = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = None if i in leave else drawn


def go(optimizer, groups, steps):
    for step in steps:
        # The second group waits, as an actor does while its critic warms up.
        give_gradients(groups, step, leave=(1,) if step == 0 else ())
        optimizer.step()
        optimizer.zero_grad()


def steps(accelerator):
    """How far three steps are from AdamW's in one process, at most, float32 parameters."""
    ours, theirs = parameters(), parameters()
    go(Processes(accelerator).split(make(ours)), ours, range(3))
    go(make(theirs), theirs, range(3))
    gaps = [
        (a - b).abs().max()
        for m, n in zip(ours, theirs, strict=True)
        for a, b in zip(m, n, strict=True)
        if a.dtype == torch.float32
    ]
    return float(torch.stack(gaps).max())


def continued(accelerator):
    """Whether a state put into a new optimizer goes on to the very same weights."""
    groups = parameters()
    optimizer = Processes(accelerator).split(make(groups))
    state = [optimizer.state_dict()]
    same = []
    for before in range(3):
        torch.distributed.broadcast_object_list(state)
        again = [[torch.nn.Parameter(p.detach().clone()) for p in group] for group in groups]
        other = Processes(accelerator).split(make(again))
        other.load_state_dict(copy.deepcopy(state[0]))
        go(optimizer, groups, [before])
        go(other, again, [before])
        same += [
            torch.equal(a, b)
            for m, n in zip(groups, again, strict=True)
            for a, b in zip(m, n, strict=True)
        ]
        state = [optimizer.state_dict()]
    return all(same)


def held(accelerator):
    """Elements of Adam's moments in this process, and in all."""
    groups = parameters()
    optimizer = Processes(accelerator).split(make(groups))
    go(optimizer, groups, range(2))
    here = sum(
        t.numel()
        for part in optimizer._parts
        for state in part.inner.state.values()
        for name, t in state.items()
        if name != "step"
    )
    return here, 2 * sum(p.numel() for group in groups for p in group)


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(sys.argv[1])

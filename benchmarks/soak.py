"""Many PPO steps of a tiny model on the CPU: does the process keep its size?

    python -m benchmarks.soak --steps 500 --json benchmarks/results/soak-NAME.json

Everything that a run does is done: rollouts, scoring, updates, records, checkpoints (two are kept)
and evaluation. The resident set is read after every step; the claim is that its largest value after
step 50 is less than 2% above that of step 50. Ends with 1 where it is not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from benchmarks import machine
from hydra_rlhf import ppo
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.data import bundled
from hydra_rlhf.model import HydraModel
from hydra_rlhf.phases import resident
from hydra_rlhf.records import Tracker

SETTLED = 50  # steps after which allocators and caches have seen what there is
ALLOWED = 0.02
EVERY = 10  # steps between two points of the curve that is written


def tiny_model(vocabulary: int) -> HydraModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    return HydraModel(lm, reward_head=torch.nn.Linear(config.hidden_size, 1, bias=False))


def soak(steps: int, method: str) -> list[int]:
    """The resident set in bytes after each step."""
    prompts = bundled.demo_prompts("train")
    tokenizer = bundled.build_tokenizer([prompt.prompt for prompt in prompts], 512)
    config = PPOConfig(
        method=method,
        lora_r=4,
        lora_last_k=1,
        max_steps=steps,
        per_device_train_batch_size=8,
        num_mini_batches=2,
        num_ppo_epochs=2,
        response_length=16,
        learning_rate=1e-4,
        save_steps=20,
        save_total_limit=2,
        eval_steps=25,
        num_eval_prompts=8,
    )
    curve: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        with Tracker(folder, config, is_main=True) as tracker:

            def on_step(step: int, metrics: dict[str, float]) -> None:
                tracker.log(step, metrics, "ppo")
                curve.append(resident()[0])
                if step % 50 == 0:
                    print(f"step {step:>5}  {curve[-1] / 2**20:8.1f} MiB", flush=True)

            ppo.train(
                config,
                tiny_model(len(tokenizer)),
                tokenizer,
                prompts,
                eval_prompts=prompts[:8],
                on_step=on_step,
                run_dir=folder,
            )
    return curve


def growth(curve: list[int]) -> float:
    """The largest value from step SETTLED on over the value there, less 1."""
    return max(curve[SETTLED - 1 :]) / curve[SETTLED - 1] - 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--method", default="hydra-ppo")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.steps <= SETTLED:
        parser.error(f"--steps must be above {SETTLED}")
    torch.set_num_threads(1)
    commit = machine.commit()
    started = time.perf_counter()
    curve = soak(given.steps, given.method)
    found = growth(curve)
    record = {
        "claim": f"resident set grows by less than {ALLOWED:.0%} after step {SETTLED}",
        "method": given.method,
        "steps": given.steps,
        "growth": round(found, 5),
        "holds": found < ALLOWED,
        "seconds": round(time.perf_counter() - started, 1),
        "curve_mib": {
            step: round(curve[step - 1] / 2**20, 2)
            for step in sorted({1, SETTLED, len(curve), *range(EVERY, len(curve) + 1, EVERY)})
        },
        "device": machine.device_name("cpu"),
        "threads": torch.get_num_threads(),
        "versions": machine.versions("cpu"),
        "commit": commit,
        "date": machine.today(),
    }
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"growth after step {SETTLED}: {found:.2%} in {len(curve)} steps")
    return 0 if found < ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())

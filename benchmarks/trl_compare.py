"""Ours and TRL's PPOTrainer on the same work, steps taken in turn.

    python benchmarks/trl_compare.py --trl-python VENV/bin/python --json OUT.jsonl

Each side is a process with its own Python: TRL 1.12 (the last release with a PPOTrainer) lives in
an environment of its own. A process builds its models, takes one step that does not count, and then
one step each time it is told, so that drift and other load fall on both. Memory is the peak of its
resident set over its resident set after the imports.

The work: a Llama of 6 layers and width 256 with random weights, 16 prompts of 32 tokens, 64 tokens
of response, rank 16 on all seven projections, 2 PPO epochs of 1 minibatch, float32, no
checkpointing. Ours is hydra-ppo with the learned reward head and a critic adapter of its own. TRL's
policy has the same adapter; its value model is a second Llama that it trains in full, and its
reward model a third.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

B, P, T, R, EPOCHS, VOCAB = 16, 32, 64, 16, 2, 8192
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)


def memory_kib() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM")}


class Turns:
    """Tells the parent how long a step took, and waits to be told to take the next."""

    def __init__(self, imported: int):
        self.imported = imported
        self.started = time.perf_counter()

    def step_done(self) -> None:
        seconds = time.perf_counter() - self.started
        peak = (memory_kib()["VmHWM"] - self.imported) / 1024
        print(json.dumps({"seconds": seconds, "peak_mib": peak}), flush=True)
        if sys.stdin.readline().strip() != "step":
            os._exit(0)  # in the middle of a trainer's loop, which has no other way out
        self.started = time.perf_counter()


def prompts() -> list[list[int]]:
    import torch

    words = torch.randint(2, VOCAB, (B, P), generator=torch.Generator().manual_seed(0))
    return words.tolist()


def ours(steps: int) -> None:
    import torch
    import transformers

    from benchmarks.bench_ppo_methods import Words
    from hydra_rlhf import ppo
    from hydra_rlhf.config import PPOConfig
    from hydra_rlhf.methods import method_from_model
    from hydra_rlhf.model import HydraModel

    turns = Turns(memory_kib()["VmRSS"])
    torch.manual_seed(0)
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    source = HydraModel(lm.eval(), reward_head=torch.nn.Linear(256, 1, bias=False))
    config = PPOConfig(
        method="hydra-ppo",
        lora_r=R,
        per_device_train_batch_size=B,
        local_rollout_forward_batch_size=B,
        num_ppo_epochs=EPOCHS,
        response_length=T,
        temperature=1.0,
        rollout_logprobs="reuse",  # as TRL does
        max_steps=steps,
        learning_rate=1e-5,
    )
    models = method_from_model("hydra-ppo", source, lora=config)
    del source, lm
    texts = [" ".join(map(str, row)) for row in prompts()]
    tokenizer: Any = Words(VOCAB)
    ppo.train(config, models, tokenizer, texts, on_step=lambda *_: turns.step_done())


def trl(steps: int) -> None:
    import datasets
    import peft
    import tokenizers
    import torch
    import transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    turns = Turns(memory_kib()["VmRSS"])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA)
    policy = transformers.LlamaForCausalLM(config)
    scored = transformers.LlamaConfig(**LLAMA, num_labels=1)
    value, reward = (transformers.LlamaForSequenceClassification(scored) for _ in range(2))
    vocab = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w2"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    rows = [{"input_ids": row} for row in prompts()]

    class Each(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            turns.step_done()

    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir="/tmp/trl_compare",
            per_device_train_batch_size=B,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=EPOCHS,
            local_rollout_forward_batch_size=B,
            response_length=T,
            temperature=1.0,
            total_episodes=B * steps,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            learning_rate=1e-5,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
        peft_config=peft.LoraConfig(r=R, lora_alpha=R, target_modules=PROJECTIONS),
        callbacks=[Each()],
    )
    trainer.train()


WORKERS: dict[str, Callable[[int], None]] = {"ours": ours, "trl": trl}


class Side:
    """A process that takes steps when it is told."""

    def __init__(self, name: str, python: str, steps: int, threads: int):
        self.name = name
        self.seconds: list[float] = []
        self.peak_mib = 0.0
        self.process = subprocess.Popen(
            [python, __file__, "--worker", name, "--steps", str(steps)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "MKL_NUM_THREADS": str(threads),
                "TRL_EXPERIMENTAL_SILENCE": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
        )

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"seconds"'):  # trainers print figures of their own
                return json.loads(line)
        raise SystemExit(f"{self.name} ended with {self.process.wait()}")

    def step(self) -> None:
        self.tell("step")
        found = self.answer()
        self.seconds.append(found["seconds"])
        self.peak_mib = found["peak_mib"]

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", choices=tuple(WORKERS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--trl-python", help="Python of an environment with trl==1.12.0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="append the records, one a line")
    args = parser.parse_args()
    if args.worker:
        WORKERS[args.worker](args.steps)
        return
    if not args.trl_python:
        parser.error("--trl-python is needed")
    sides = [
        Side(name, python, args.rounds + 1, args.threads)
        for name, python in (("ours", sys.executable), ("trl", args.trl_python))
    ]
    for side in sides:
        side.answer()  # the first step does not count
    for _ in range(args.rounds):
        for side in sides:
            side.step()
    for side in sides:
        side.tell("stop")
        side.process.wait()
    report(sides, args)


def report(sides: list[Side], args: argparse.Namespace) -> None:
    import torch

    from benchmarks.harness import Record, Shape
    from benchmarks.measure import quantile

    torch.set_num_threads(args.threads)
    ask = "import trl; print(trl.__version__)"
    version = subprocess.run(
        [args.trl_python, "-c", ask], capture_output=True, text=True, check=True
    ).stdout.strip()
    shape = Shape({"B": B, "P": P, "T": T, "R": R, "E": EPOCHS, "V": VOCAB}, "against TRL")
    base = sides[1]
    for side in sides:
        seconds = statistics.median(side.seconds)
        figures = {
            "time_over_trl": seconds / statistics.median(base.seconds),
            "memory_over_trl": side.peak_mib / base.peak_mib,
        }
        name = "hydra-ppo" if side.name == "ours" else f"trl {version}"
        record = Record.of(
            "trl_compare",
            "step",
            name,
            shape,
            torch.float32,
            "cpu",
            ms=1e3 * seconds,
            ms_p20=1e3 * quantile(side.seconds, 0.2),
            ms_p80=1e3 * quantile(side.seconds, 0.8),
            peak_mib=side.peak_mib,
            repeats=len(side.seconds),
            timing="wall",
            figures=figures,
        )
        print(
            f"{name}: {seconds:.2f} s a step ({figures['time_over_trl']:.2f} of TRL's), "
            f"{side.peak_mib:.0f} MiB above imports ({figures['memory_over_trl']:.2f})"
        )
        if args.json:
            with args.json.open("a") as out:
                out.write(record_line(record) + "\n")


def record_line(record: Any) -> str:
    from dataclasses import asdict

    return json.dumps(asdict(record))


if __name__ == "__main__":
    main()

"""Ours, TRL's PPOTrainer and LLaMA-Factory's on the same work, steps taken in turn.

    python benchmarks/trl_compare.py --trl-python VENV/bin/python --trl011-python OLD/bin/python \\
        --llamafactory-python LF/bin/python --json OUT.jsonl

Each side is a process with its own Python, the others in environments of their own: TRL 1.12 is the
last release with a PPOTrainer (needs the transformers of the day), 0.11.4 the last with the older
one (ran with transformers 4.46.3, peft 0.13.2), and LLaMA-Factory 0.9.3 the last that installs the
TRL (0.9.6) its PPO is made of (ran with transformers 4.51.3, peft 0.15.2). A process builds its
models, takes one step that does not count, and then one step each time it is told, so that drift
and other load fall on all. Memory is the peak of its resident set over its resident set after the
imports.

The work: a Llama of 6 layers and width 256 with random weights, 16 prompts of 32 tokens, 64 tokens
of response, rank 16 on all seven projections, 2 PPO epochs of 1 minibatch, float32, no
checkpointing. Ours is hydra-ppo with the learned reward head and a critic adapter of its own. TRL's
policy has the same adapter. 1.12's value model is a second Llama that it trains in full, and its
reward model a third. 0.11.4 has a value head on the policy's own trunk, so one pass gives both, its
reference is the policy with the adapter off, and the reward model is a second Llama outside it.
LLaMA-Factory does the same with a reward model that is a second adapter of the one Llama
(reward_model_type lora), so like ours it holds one language model; it cannot force a length, and a
row that samples the end of text (1 token of 8192) is a little shorter.
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
    from hydra_rlhf.methods import with_adapters
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
    model = with_adapters(source, ("actor", "critic"), config)  # in place: no second copy
    texts = [" ".join(map(str, row)) for row in prompts()]
    tokenizer: Any = Words(VOCAB)
    ppo.train(config, model, tokenizer, texts, on_step=lambda *_: turns.step_done())


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
    tokenizer = word_tokenizer(tokenizers, transformers)
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


def trl_0_11(steps: int) -> None:
    import peft
    import tokenizers
    import torch
    import transformers
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    turns = Turns(memory_kib()["VmRSS"])
    torch.manual_seed(0)
    policy = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    lora = peft.LoraConfig(
        r=R, lora_alpha=R, target_modules=PROJECTIONS, task_type=peft.TaskType.CAUSAL_LM
    )
    model = AutoModelForCausalLMWithValueHead(peft.get_peft_model(policy, lora))
    model.is_peft_model = True  # from_pretrained sets it, and it loads from files alone
    reward = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**LLAMA, num_labels=1)
    ).eval()
    trainer = PPOTrainer(
        config=PPOConfig(
            batch_size=B,
            mini_batch_size=B,
            gradient_accumulation_steps=1,
            ppo_epochs=EPOCHS,
            learning_rate=1e-5,
            init_kl_coef=0.05,
            adap_kl_ctrl=False,
            # float32; whether there is a GPU, other releases of accelerate decide
            accelerator_kwargs={"cpu": True},
        ),
        model=model,
        tokenizer=word_tokenizer(tokenizers, transformers),
    )
    queries = [torch.tensor(row) for row in prompts()]
    sampling = dict(min_new_tokens=T, max_new_tokens=T, do_sample=True, top_k=0, top_p=1.0)
    for _ in range(steps):
        responses = trainer.generate(queries, batch_size=B, return_prompt=False, **sampling)
        with torch.no_grad():
            whole = torch.stack([torch.cat(pair) for pair in zip(queries, responses, strict=True)])
            scores = list(reward(whole, attention_mask=torch.ones_like(whole)).logits[:, 0])
        trainer.step(queries, list(responses), scores)
        turns.step_done()


def llamafactory(steps: int) -> None:
    import tempfile

    import peft
    import safetensors.torch
    import tokenizers
    import torch
    import transformers
    from llamafactory.train.tuner import run_exp

    class Each(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            turns.step_done()

    turns = Turns(memory_kib()["VmRSS"])
    # Its interface is files: the base model, the reward adapter with its head, and the prompts.
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    base.save_pretrained(folder / "base")
    word_tokenizer(tokenizers, transformers).save_pretrained(folder / "base")
    lora = peft.LoraConfig(
        r=R, lora_alpha=R, target_modules=PROJECTIONS, task_type=peft.TaskType.CAUSAL_LM
    )
    peft.get_peft_model(base, lora).save_pretrained(folder / "reward")
    head = {"v_head.summary.weight": torch.randn(1, 256), "v_head.summary.bias": torch.zeros(1)}
    safetensors.torch.save_file(head, folder / "reward" / "value_head.safetensors")
    rows = [
        {"instruction": " ".join(f"w{i}" for i in row), "input": "", "output": "w2"}
        for row in prompts()
    ]
    (folder / "prompts.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(
        json.dumps({"prompts": {"file_name": "prompts.json"}})
    )
    del base, head
    run_exp(
        dict(
            stage="ppo",
            do_train=True,
            model_name_or_path=str(folder / "base"),
            reward_model=str(folder / "reward"),
            reward_model_type="lora",
            finetuning_type="lora",
            lora_target="all",
            lora_rank=R,
            lora_alpha=R,
            dataset="prompts",
            dataset_dir=str(folder),
            template="empty",
            cutoff_len=2 * P,  # it keeps some for an answer
            preprocessing_num_workers=1,
            dataloader_num_workers=0,
            output_dir=str(folder / "out"),
            per_device_train_batch_size=B,
            gradient_accumulation_steps=1,
            ppo_epochs=EPOCHS,
            ppo_buffer_size=1,
            max_steps=steps,
            max_new_tokens=T,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            learning_rate=1e-5,
            disable_gradient_checkpointing=True,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1000,
        ),
        callbacks=[Each()],
    )


def word_tokenizer(tokenizers: Any, transformers: Any) -> Any:
    vocab = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w2"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


WORKERS: dict[str, Callable[[int], None]] = {
    "ours": ours,
    "trl": trl,
    "trl011": trl_0_11,
    "llamafactory": llamafactory,
}


class Side:
    """A process that takes steps when it is told."""

    def __init__(self, name: str, python: str, steps: int, threads: int):
        self.name, self.python = name, python
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
    parser.add_argument("--trl011-python", help="Python of an environment with trl==0.11.4")
    parser.add_argument("--llamafactory-python", help="and one with llamafactory==0.9.3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="append the records, one a line")
    args = parser.parse_args()
    if args.worker:
        WORKERS[args.worker](args.steps)
        return
    pythons = {
        "ours": sys.executable,
        "trl": args.trl_python,
        "trl011": args.trl011_python,
        "llamafactory": args.llamafactory_python,
    }
    sides = [
        Side(name, python, args.rounds + 1, args.threads)
        for name, python in pythons.items()
        if python
    ]
    if len(sides) < 2:
        parser.error("give --trl-python, --trl011-python, --llamafactory-python or several of them")
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
    shape = Shape({"B": B, "P": P, "T": T, "R": R, "E": EPOCHS, "V": VOCAB}, "against TRL")
    ours = sides[0]
    for side in sides:
        seconds = statistics.median(side.seconds)
        figures = {
            "time_of_ours_over_this": statistics.median(ours.seconds) / seconds,
            "memory_of_ours_over_this": ours.peak_mib / side.peak_mib,
        }
        record = Record.of(
            "trl_compare",
            "step",
            "hydra-ppo" if side is ours else version_of(side),
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
            f"{record.backend}: {seconds:.2f} s a step, {side.peak_mib:.0f} MiB above imports; "
            f"ours over it: {figures['time_of_ours_over_this']:.2f} in time, "
            f"{figures['memory_of_ours_over_this']:.2f} in memory"
        )
        if args.json:
            with args.json.open("a") as out:
                out.write(record_line(record) + "\n")


def version_of(side: Side) -> str:
    package = "llamafactory" if side.name == "llamafactory" else "trl"
    ask = f"import importlib.metadata as m; print(m.version({package!r}))"
    found = subprocess.run([side.python, "-c", ask], capture_output=True, text=True, check=True)
    return f"{package} {found.stdout.strip()}"


def record_line(record: Any) -> str:
    from dataclasses import asdict

    return json.dumps(asdict(record))


if __name__ == "__main__":
    main()

"""PPO methods on a Llama-7b-shaped model with random weights in bfloat16, at rank 128.

For each method and length one step of ``hydra_rlhf.ppo.train``: bytes held by models and optimizer,
the peak, seconds per sample with their phases, and the peak that ``plan`` predicts. The shortest
length of every method comes first; what the time does not reach is reported as such.
"""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))  # the repository's root: benchmarks, hydra_rlhf

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks import harness, measure
from benchmarks.harness import Record, Shape
from hydra_rlhf import memory, ppo
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.methods import MethodModels, method_from_model
from hydra_rlhf.model import HydraModel

METHODS = ("lora-ppo", "d-lora-ppo", "j-hydra-ppo", "hydra-ppo")
OP = "ppo_methods"
SPARE = 16  # seconds of the part's limit for the last record and being stopped
LLAMA_7B = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=4096,
)
SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
# B sequences of P prompt and T response tokens
SHAPES = [
    Shape({"B": 8, "P": 64, "T": 64, "R": 128}, "short"),
    Shape({"B": 8, "P": 128, "T": 128, "R": 128}, "RLHF's summaries"),
    Shape({"B": 8, "P": 256, "T": 256, "R": 128}, "dialogue"),
]
TINY = [Shape({"B": 2, "P": 4, "T": 4, "R": 2}, "a dry run")]


def make_base(sizes: dict[str, int], device: str, dtype: torch.dtype) -> HydraModel:
    config = transformers.LlamaConfig(**sizes, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    with torch.device(device):
        lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model = HydraModel(lm)
        for head in (model.reward_head, model.value_head):
            torch.nn.init.normal_(head.weight, std=0.02)
    return model


def make_tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """One word a token."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    words |= {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def settings(method: str, shape: Shape, response_length: int) -> PPOConfig:
    return PPOConfig(
        sft_model_path="random weights",
        method=method,
        lora_r=shape.sizes["R"],
        lora_alpha=shape.sizes["R"],
        per_device_train_batch_size=shape.sizes["B"],
        local_rollout_forward_batch_size=shape.sizes["B"],
        response_length=response_length,
        min_response_length=response_length,  # so that every method computes as many tokens
        num_ppo_epochs=1,
        max_steps=1,
        share_prefix=False,  # every layer is adapted
    )


def planned_gib(sizes: dict[str, int], shape: Shape, method: str, dtype: str) -> float:
    """The peak that ``plan`` predicts, from configurations alone. Runs in a process of its own."""
    config = transformers.LlamaConfig(**sizes, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    config.dtype = dtype
    full = settings(method, shape, shape.sizes["T"])
    return memory.plan(config, full, prompt_length=shape.sizes["P"]).peak / 2**30


def one_step(config: PPOConfig, models: MethodModels, tokenizer, prompts: list[str]) -> dict:
    return ppo.train(config, models, tokenizer, prompts).metrics[-1]


def measure_method(
    method: str, base: HydraModel, tokenizer, shape: Shape, device: str
) -> dict[str, float]:
    """The figures of one method at one shape."""
    cuda = device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    full = settings(method, shape, shape.sizes["T"])
    models = method_from_model(method, base, lora=full)
    generator = torch.Generator().manual_seed(0)
    size = (shape.sizes["B"], shape.sizes["P"])
    words = torch.randint(3, base.config.vocab_size, size, generator=generator)
    prompts = [" ".join(f"w{i}" for i in row) for row in words.tolist()]
    # Kernels are compiled and chosen here, not in the step that counts.
    one_step(settings(method, shape, min(4, shape.sizes["T"])), models, tokenizer, prompts)
    gc.collect()
    figures: dict[str, float] = {}
    if cuda:
        torch.cuda.empty_cache()
        # Models without optimizer state: that went with the warm-up's optimizer.
        figures["models_gib"] = (torch.cuda.memory_allocated() - before) / 2**30
    else:
        held = {p.data_ptr(): p.nbytes for model in models for p in model.parameters()}
        figures["models_gib"] = sum(held.values()) / 2**30
    metrics = one_step(full, models, tokenizer, prompts)
    phases = ("rollout", "score", "advantages", "update")
    figures |= {f"{name}_s": metrics[f"time/{name}"] for name in phases}
    figures["s_per_sample"] = sum(figures[f"{n}_s"] for n in phases) / shape.sizes["B"]
    if cuda:
        figures["held_gib"] = (metrics["memory/update_held"] - before) / 2**30
        peak = max(metrics[f"memory/{name}_peak"] for name in phases)
        figures["peak_gib"] = (peak - before) / 2**30
    figures["distinct_models"] = float(len(models.distinct))
    return figures


def run(device: str, dry_run: bool, deadline: float) -> Iterator[Record]:
    sizes = SMALL if dry_run else LLAMA_7B
    dtype = torch.float32 if dry_run else torch.bfloat16
    due = [(shape, method) for shape in (TINY if dry_run else SHAPES) for method in METHODS]
    # Predictions need no GPU: they are made beside the measurements, not in their time.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as beside:
        plans = {
            (str(shape), method): beside.submit(planned_gib, sizes, shape, method, str(dtype)[6:])
            for shape, method in due
        }
        base = make_base(sizes, device, dtype)
        tokenizer = make_tokenizer(base.config.vocab_size)
        took: dict[str, float] = {}
        for shape, method in due:
            started = time.monotonic()
            # Twice the tokens take at most two and a half times as long.
            if started + 2.5 * took.get(method, 0.0) > deadline:
                status, why, figures = "not reached", "the part's time was over", {}
                plans[str(shape), method].cancel()
            else:
                status, why, figures = attempt(method, base, tokenizer, shape, device)
                took[method] = time.monotonic() - started
                figures |= prediction(plans[str(shape), method], deadline)
            repeats = int(status == "ok")
            yield Record.of(
                OP, method, "hydra_rlhf", shape, dtype, device,
                status=status, why=why, figures=figures, repeats=repeats, timing="wall",
            )  # fmt: skip
        beside.shutdown(wait=False, cancel_futures=True)


def attempt(
    method: str, base: HydraModel, tokenizer, shape: Shape, device: str
) -> tuple[str, str, dict[str, float]]:
    try:
        return "ok", "", measure_method(method, base, tokenizer, shape, device)
    except Exception as error:
        return "failed", measure.reason(error), {}
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def prediction(plan: concurrent.futures.Future, deadline: float) -> dict[str, float]:
    try:
        return {"planned_gib": plan.result(max(1.0, deadline - time.monotonic()))}
    except concurrent.futures.TimeoutError:
        print("plan: not done in time")
    except Exception as error:
        print(f"plan: {measure.reason(error)}")
    return {}


def main(out: Path, limit: float, dry_run: bool) -> int:
    device = "cpu" if dry_run else "cuda"
    bad = 0
    for record in run(device, dry_run, time.monotonic() + limit - SPARE):
        harness.write(record, out / "ppo.jsonl")
        print(record.mode, record.shape, record.status, record.why, record.figures, flush=True)
        # On a GPU the time may be short; a dry run is there to see that everything works.
        bad += record.status == "failed" or (dry_run and "planned_gib" not in record.figures)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), "--dry-run" in sys.argv))

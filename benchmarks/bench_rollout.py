"""Sampling responses: the engine beside transformers' ``generate``, over our layers and PEFT's.

Random weights, adapters of rank 16 on every linear layer, prompts without padding, responses of a
fixed length. The engine's rows come with log-probabilities, those of ``generate`` are tokens alone.
A record is one batch; ``figures`` has the tokens per second. The floor of a GPU row is the time to
read the weights once a token and the keys and values that are there by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
import transformers

from benchmarks.harness import Options, Record, Shape
from benchmarks.measure import quantile, time_calls
from hydra_rlhf.engine import RolloutEngine
from hydra_rlhf.model import HydraModel, default_lora_config
from hydra_rlhf.rollout import Sampling, generate

OP = "rollout"
MODES = ("sample",)
PEERS = ("generate, fused", "generate, peft")
SHAPES = {
    "cpu": [
        Shape({"B": 16, "P": 32, "T": 64}, "a rollout of a small model", quick=True),
        Shape({"B": 1, "P": 32, "T": 64}, "one prompt: calls cost more than arithmetic"),
    ],
    "cuda": [
        Shape({"B": 8, "P": 128, "T": 64}, "a short rollout of a Llama-7b shape", quick=True),
        Shape({"B": 1, "P": 512, "T": 128}, "one prompt: launches cost more than arithmetic"),
        Shape({"B": 32, "P": 512, "T": 512}, "a rollout of a Llama-7b shape"),
    ],
}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
SMALL: dict[str, int] = dict(
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=688,
    vocab_size=8192,
    max_position_embeddings=512,
)
LLAMA_7B: dict[str, int] = dict(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    intermediate_size=11008,
    vocab_size=32000,
    max_position_embeddings=2048,
)


def models(device: str, sizes: dict[str, int], dtype: torch.dtype) -> tuple[HydraModel, Any]:
    """Ours and PEFT's own, with the same weights and float32 adapters."""
    config = transformers.LlamaConfig(**sizes)
    with torch.device(device):  # a host takes minutes to draw the weights of a 7b
        ours, theirs = (
            transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            for _ in range(2)
        )
    theirs.load_state_dict(ours.state_dict())
    lora = default_lora_config(ours, r=16)
    model = HydraModel(ours, adapters=("actor", "critic"), lora_config=lora)
    stock = peft.get_peft_model(theirs, lora, adapter_name="actor")
    with torch.no_grad():
        for a, b in zip(model.adapter_parameters("actor"), _lora_of(stock), strict=True):
            b.copy_(a.normal_(std=0.02))
    return model, stock.eval()


def _lora_of(model: Any) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lora_" in name]


def calls(
    model: HydraModel, stock: Any, shape: Shape, device: str
) -> tuple[dict[str, Callable[[], Any]], Callable[[], str]]:
    """The rows, and what is wrong with their greedy tokens ("" when nothing is)."""
    B, P, T = (shape.sizes[name] for name in "BPT")
    vocab = model.config.vocab_size
    ids = torch.randint(1, vocab, (B, P), device=device)
    mask = torch.ones_like(ids)
    # A stop token that cannot come before the end: every row makes T tokens.
    sampling = Sampling(T, 1.0, (0,), 0, min_response_length=T)
    engine = RolloutEngine(model)
    fixed = dict(max_new_tokens=T, min_new_tokens=T, eos_token_id=0, pad_token_id=0)

    def by_peft(do_sample: bool) -> torch.Tensor:
        with torch.no_grad():
            return stock.generate(
                input_ids=ids, attention_mask=mask, do_sample=do_sample, top_k=0, **fixed
            )

    def wrong() -> str:
        greedy = sampling._replace(do_sample=False)
        mine = engine(model, ids, mask, greedy).query_responses
        others = {
            "generate, fused": generate(model, ids, mask, greedy).query_responses,
            "generate, peft": by_peft(False),
        }
        # In bfloat16 ties are broken by rounding, and what follows a broken tie differs: the first
        # tokens of a response tell more than the last.
        exact = model.causal_lm.dtype == torch.float32
        share, width = (1.0, P + T) if exact else (0.5, P + 4)
        for name, tokens in others.items():
            same = (tokens == mine)[:, P:width].float().mean().item()
            if same < share:
                return f"only {same:.1%} of the greedy tokens are those of {name}"
        return ""

    rows = {
        "hydra": lambda: engine(model, ids, mask, sampling, with_logprobs=True),
        "hydra, adapter off": lambda: engine(
            model, ids, mask, sampling, role="reference", with_logprobs=True
        ),
        "generate, fused": lambda: generate(model, ids, mask, sampling),
        "generate, peft": lambda: by_peft(True),
    }
    return rows, wrong


def bytes_read(model: HydraModel, shape: Shape) -> int:
    """Weights once a token, and on average P + T / 2 tokens' keys and values of every row."""
    B, P, T = (shape.sizes[name] for name in "BPT")
    config = model.config
    element = torch.empty(0, dtype=model.causal_lm.dtype).element_size()
    weights = sum(p.numel() for n, p in model.base.named_parameters() if "embed" not in n) * element
    head = config.hidden_size // config.num_attention_heads
    past = 2 * config.num_hidden_layers * config.num_key_value_heads * head * element
    return T * (weights + B * past * (P + T // 2))


def run(options: Options) -> Iterator[Record]:
    device = options.device
    torch.manual_seed(0)
    cases = [(dtype, shape) for dtype in DTYPES[device] for shape in SHAPES[device]]
    dtype = None
    for wanted, shape in cases:
        if options.quick and not (shape.quick and wanted == DTYPES[device][0]):
            continue
        if time.monotonic() > options.deadline:
            late = dict(status="not reached", why="the run's time was over")
            yield Record.of(OP, "sample", "hydra", shape, wanted, device, **late)
            continue
        options.say(f"rollout {shape} {wanted}")
        if wanted != dtype:
            dtype = wanted
            model, stock = models(device, LLAMA_7B if device == "cuda" else SMALL, dtype)
        rows, wrong = calls(model, stock, shape, device)
        found = wrong()
        if found:
            yield Record.of(OP, "sample", "hydra", shape, dtype, device, status="wrong", why=found)
            continue
        ms, _, failures = time_calls(rows, device, options.rounds)
        tokens = shape.sizes["B"] * shape.sizes["T"]
        moved = bytes_read(model, shape)
        for row in rows:
            if row in failures:
                yield Record.of(
                    OP, "sample", row, shape, dtype, device, status="failed", why=failures[row]
                )
                continue
            median = quantile(ms[row], 0.5)
            yield Record.of(
                OP,
                "sample",
                row,
                shape,
                dtype,
                device,
                ms=median,
                ms_p20=quantile(ms[row], 0.2),
                ms_p80=quantile(ms[row], 0.8),
                gb_per_s=moved / median / 1e6,
                repeats=len(ms[row]),
                timing="wall",
                figures={"tokens_per_s": tokens / median * 1e3},
            )

"""The five PPO methods side by side: bytes and seconds per sample, by phase.

Every method starts from the same random Llama and runs whole steps of ``hydra_rlhf.ppo.train``,
methods in turn within a round. Before a time counts, the adapter methods must agree on what they
computed: same scores, same KL, same loss.

Figures of a record, seconds per sample except where said: ``rollout_s``, ``score_s``,
``advantages_s``, ``update_s``, ``outside_s`` (all but the rollout), ``s_per_sample``;
``static_mib`` (weights, heads, adapters), ``peak_mib`` (counted at the dispatcher over one step,
optimizer state included), ``planned_mib`` (what ``plan`` says of it), ``passes``. Times are medians
over the rounds, and ``outside_p20``, ``outside_p80`` the spread.

Rows named ``..., upper half`` have adapters on the upper half of the blocks, with the shared prefix
and, ``no sharing``, without it. Only the methods of one model share it between roles; lora-ppo's
actor and critic keep one each. Rows named ``..., same memory`` run the largest batch whose planned
peak is within lora-ppo's at ``B``. ``<figure>_over:<row>`` is a ratio to another row of the same
rounds: what is outside generation to lora-ppo's with the same adapters, and an update with shared
prefix to one without and to one with adapters everywhere.

What can be expected, F the trunk's forward and B its backward, which is about as much: with four
epochs and adapters everywhere lora-ppo makes 4 F to score and 8 (F + B) to update, hydra-ppo 3 F
and the same update: 5% less, and 13% with one epoch. With adapters on the upper half lora-ppo makes
4 F + 8 (F + B / 2), hydra-ppo with the shared prefix F / 2 + 3 F / 2 + 8 (F / 2 + B / 2): 37% less.
The causal head's passes, the same in all of them, and what is not the trunk's make each share less.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers

from benchmarks.harness import Options, Record, Shape
from benchmarks.measure import quantile
from hydra_rlhf import memory, ppo
from hydra_rlhf.config import METHODS, PPOConfig
from hydra_rlhf.methods import MethodModels, method_from_model
from hydra_rlhf.model import HydraModel

OP = "ppo_methods"
MODES = METHODS
PHASES = ("rollout", "score", "advantages", "update")
# B sequences of P prompt and T response tokens, R rank, E PPO epochs; the model's sizes.
SHAPES = {
    "cpu": [
        Shape({"B": 16, "P": 32, "T": 64, "R": 16, "E": 4, "D": 256, "layers": 6, "V": 8192},
              "the small Llama of the comparison with TRL, at the default of 4 epochs"),
    ],
    "cuda": [
        Shape({"B": 8, "P": 128, "T": 128, "R": 128, "E": 4, "D": 2048, "layers": 16, "V": 32000},
              "a 1B Llama"),
    ],
}  # fmt: skip
QUICK = Shape(
    {"B": 4, "P": 6, "T": 6, "R": 4, "E": 2, "D": 32, "layers": 2, "V": 97}, "a dry run", quick=True
)


@dataclass
class Row:
    """One thing that is timed."""

    name: str
    config: PPOConfig
    models: MethodModels
    seconds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PHASES})
    metrics: dict[str, float] = field(default_factory=dict)
    peak: int = 0

    def samples(self, phase: str) -> list[float]:
        """Seconds a sample of each round, of one phase."""
        return [seconds / self.config.local_batch_size for seconds in self.seconds[phase]]

    def outside(self) -> list[float]:
        """Seconds a sample of each round, without the rollout."""
        parts = [self.seconds[phase] for phase in PHASES if phase != "rollout"]
        return [sum(round_) / self.config.local_batch_size for round_ in zip(*parts, strict=True)]


def model_config(shape: Shape, dtype: torch.dtype) -> transformers.LlamaConfig:
    D = shape.sizes["D"]
    heads = max(D // 32, 2)
    return transformers.LlamaConfig(
        vocab_size=shape.sizes["V"],
        hidden_size=D,
        intermediate_size=D * 43 // 16,  # 688 at 256
        num_hidden_layers=shape.sizes["layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        dtype=str(dtype).removeprefix("torch."),
    )


def settings(method: str, shape: Shape, **changes: Any) -> PPOConfig:
    base = PPOConfig(
        method=method,
        lora_r=shape.sizes["R"],
        per_device_train_batch_size=shape.sizes["B"],
        response_length=shape.sizes["T"],
        # Every method computes as many tokens: no response may end early.
        min_response_length=shape.sizes["T"],
        num_ppo_epochs=shape.sizes["E"],
        max_steps=1,
        temperature=1.0,
        learning_rate=1e-5,
    )
    return replace(base, **changes)


class Words:
    """A tokenizer whose n-th word is token n; all that ``ppo.train`` asks of one."""

    eos_token_id, pad_token_id = 1, 0

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: torch.Tensor, **_: Any) -> str:
        return " ".join(str(i) for i in ids.tolist())


def prompts_of(shape: Shape, batch: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    size = (batch, shape.sizes["P"])
    words = torch.randint(2, shape.sizes["V"], size, generator=generator)
    # One prompt in four is shorter, so that there is padding.
    short = shape.sizes["P"] // 2
    return [
        " ".join(map(str, row[short:] if i % 4 == 0 else row))
        for i, row in enumerate(words.tolist())
    ]


def step(row: Row, shape: Shape, tokenizer: Words) -> dict[str, float]:
    prompts = prompts_of(shape, row.config.local_batch_size)
    tokens: Any = tokenizer
    return ppo.train(row.config, row.models, tokens, prompts).metrics[-1]


def disagreement(rows: list[Row], dtype: torch.dtype) -> str:
    """Why the methods that train the same adapters did not compute the same; "" where they did.

    In half precision they round otherwise, since their batches and ranks are put together in other
    ways: a token in a thousand is drawn otherwise, and what follows it in its row.
    """
    allowed = 1e-3 if dtype == torch.float32 else 0.5
    same = [r for r in rows if r.name in ("lora-ppo", "d-lora-ppo", "hydra-ppo")]
    for name in ("objective/scores", "objective/kl", "loss/value_avg"):
        values = [r.metrics[name] for r in same]
        most = allowed * max(1.0, abs(values[0]))
        if not all(abs(a - b) <= most for a in values for b in values):  # nor where one is NaN
            return f"{name} differs between methods: {values}"
    return ""


def rows_of(shape: Shape, source: HydraModel, dtype: torch.dtype) -> list[Row]:
    half = shape.sizes["layers"] // 2
    config = model_config(shape, dtype)
    where: dict[str, Any] = {"prompt_length": shape.sizes["P"], "device": source.device.type}

    def planned(method: str, batch: int) -> memory.MethodPlan:
        sized = settings(method, shape, per_device_train_batch_size=batch)
        return memory.plan(config, sized, **where)

    wanted = [(method, settings(method, shape)) for method in METHODS]
    for method in ("lora-ppo", "hydra-ppo", "j-hydra-ppo"):
        upper = settings(method, shape, lora_last_k=half)
        wanted.append((f"{method}, upper half", upper))
        wanted.append((f"{method}, upper half, no sharing", replace(upper, share_prefix=False)))
    budget = planned("lora-ppo", shape.sizes["B"]).peak
    for method in METHODS:
        if method == "lora-ppo":
            continue  # it is the one whose memory the others have
        batch = memory.largest_batch(
            config, settings(method, shape), budget, method=method, **where
        )
        if batch == 0:
            continue  # its weights alone are more
        sized = settings(
            method,
            shape,
            per_device_train_batch_size=batch,
            local_rollout_forward_batch_size=batch,
        )
        wanted.append((f"{method}, same memory", sized))
    rows = []
    for name, settled in wanted:
        torch.manual_seed(0)
        rows.append(Row(name, settled, method_from_model(settled.method, source, lora=settled)))
    return rows


def source_of(shape: Shape, dtype: torch.dtype, device: str) -> HydraModel:
    """A decoder with random weights, drawn on the device, and heads that are alike everywhere."""
    config = model_config(shape, dtype)
    with torch.device(device):
        lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        source = HydraModel(lm.eval())
    drawn = torch.empty(source.reward_head.weight.shape)
    drawn.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for head in (source.reward_head, source.value_head):
            head.weight.copy_(drawn)
    return source


def run(options: Options) -> Iterator[Record]:
    """All rows, in turn within a round."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    for shape in [QUICK] if options.quick else SHAPES[options.device]:
        torch.manual_seed(0)
        source = source_of(shape, dtype, options.device)
        tokenizer = Words(shape.sizes["V"])
        # What a fixed length does to ratios and EOS is known here.
        logging.getLogger("hydra_rlhf").setLevel(logging.ERROR)
        rows = rows_of(shape, source, dtype)
        if options.modes:
            rows = [row for row in rows if row.name in options.modes]
        for row in rows:
            options.say(f"{OP} {row.name}: first step, bytes counted")
            with memory.Ledger() as ledger:
                row.metrics = step(row, shape, tokenizer)
            row.peak = ledger.peak
        wrong = disagreement(rows, dtype)
        rounds = 1 if options.quick else 3
        for i in range(0 if wrong else rounds):
            for row in rows:
                if time.monotonic() > options.deadline:
                    break
                options.say(f"{OP} {row.name}: round {i + 1} of {rounds}")
                row.metrics = step(row, shape, tokenizer)
                for phase in PHASES:
                    row.seconds[phase].append(row.metrics[f"time/{phase}"])
        named = {row.name: row for row in rows}
        for row in rows:
            yield record(row, named, shape, dtype, options.device, wrong)


def ratios(row: Row, named: dict[str, Row]) -> dict[str, float]:
    """Seconds a sample over those of the rows that it is to be held against, round by round."""
    method, _, variant = row.name.partition(", ")
    upper = variant.startswith("upper half")
    against = {
        "outside": ["lora-ppo, upper half, no sharing" if upper else "lora-ppo"],
        "update": [method, f"{method}, upper half, no sharing"] if upper else [],
    }
    found = {}
    for figure, others in against.items():
        for other in others:
            if other == row.name or other not in named:
                continue
            mine, theirs = (
                r.outside() if figure == "outside" else r.samples("update")
                for r in (row, named[other])
            )
            each = [a / b for a, b in zip(mine, theirs, strict=False)]
            if each:
                found[f"{figure}_over:{other}"] = statistics.median(each)
    return found


def record(
    row: Row, named: dict[str, Row], shape: Shape, dtype: torch.dtype, device: str, wrong: str
) -> Record:
    batch = row.config.local_batch_size
    sized = Shape({**shape.sizes, "B": batch}, shape.why)
    plan = memory.plan(
        model_config(shape, dtype), row.config, prompt_length=shape.sizes["P"], device=device
    )
    static = plan.static
    mib = 2.0**20
    figures = {
        "static_mib": static / mib,
        "weights_mib": plan.weights / mib,
        "peak_mib": (static + row.peak) / mib,
        "planned_mib": plan.peak / mib,
        "peak_gib": (static + row.peak) / 2**30,
        "held_gib": (static + plan.optimizer) / 2**30,
        "planned_gib": plan.peak / 2**30,
        "passes": float(row.models.num_passes()),
    }
    status, ms = ("wrong", None) if wrong else ("not reached", None)
    outside = row.outside()
    if outside and not wrong:
        status = "ok"
        for phase in PHASES:
            figures[f"{phase}_s"] = statistics.median(row.seconds[phase]) / batch
        figures["outside_s"] = statistics.median(outside)
        figures["outside_p20"] = quantile(outside, 0.2)
        figures["outside_p80"] = quantile(outside, 0.8)
        figures["s_per_sample"] = figures["outside_s"] + figures["rollout_s"]
        figures |= ratios(row, named)
        ms = 1e3 * figures["s_per_sample"]
    return Record.of(
        OP,
        row.name,
        "hydra_rlhf",
        sized,
        dtype,
        device,
        status=status,
        why=wrong,
        ms=ms,
        repeats=len(outside),
        timing="wall" if outside else "",
        peak_mib=figures["peak_mib"],
        figures=figures,
    )

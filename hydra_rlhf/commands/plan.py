"""``hydra-rlhf plan``."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from hydra_rlhf import evaluate, hub, memory
from hydra_rlhf.config import METHODS, PPOConfig
from hydra_rlhf.errors import UserError
from hydra_rlhf.memory import MethodPlan
from hydra_rlhf.settings import required, setting

GB = 1e9
NOT_COUNTED = (
    "Counted is what tensors hold. Not counted, and what reserve_gb is for: the driver's context, "
    "workspaces of cuBLAS, and what the allocator rounds up and cannot join. Processes are planned "
    "as one that holds everything."
)


@dataclass
class PlanInput:
    """What is planned."""

    _argument_group_name = "plan"

    model: str = required("folder or hub name; only its config.json is read")
    prompt_length: int = setting(512, "tokens a prompt is padded to")
    card_gb: float = setting(80.0, "memory of the card, in GB (1e9 bytes)")
    device: str = setting("cuda", "whose kernels and buffers are counted", choices=memory.DEVICES)
    reserve_gb: float = setting(1.0, "kept free on it for the driver and the allocator")
    chart: str | None = setting(None, "file for a bar chart, PNG")
    json: bool = setting(False, "print the plans as JSON, in bytes")
    batch_search: bool = setting(True, "also find the largest batch that fits, for each method")


ARGUMENTS = (PlanInput, PPOConfig)
POSITIONALS = ("model",)


def run(given: PlanInput, config: PPOConfig) -> list[MethodPlan]:
    """Prints a table or JSON; writes a chart where one is asked for."""
    if given.prompt_length < 2:
        raise UserError(f"prompt_length must be at least 2, got {given.prompt_length}")
    budget = int((given.card_gb - given.reserve_gb) * GB)
    if budget <= 0:
        raise UserError(f"card_gb {given.card_gb} is not above reserve_gb {given.reserve_gb}")
    if given.chart is not None and not Path(given.chart).resolve().parent.is_dir():
        raise UserError(f"chart: there is no folder {Path(given.chart).parent}")
    model_config = _config_of(given.model)
    reward_config = None
    if config.reward_model_path is not None:
        reward_config = _config_of(config.reward_model_path)
    planner = memory.Planner(
        model_config,
        config,
        reward_config=reward_config,
        prompt_length=given.prompt_length,
        device=given.device,
        card=given.card_gb * GB,
    )
    plans = [planner.plan(method) for method in METHODS]
    largest = None
    if given.batch_search:
        largest = [planner.largest_batch(budget, method) for method in METHODS]
    if given.json:
        print(json.dumps(as_json(plans, budget, largest), indent=2))
    else:
        Console().print(table(plans, budget, largest))
        for i, p in enumerate(plans):
            if p.peak > budget:
                print(way_out(p, config, budget, None if largest is None else largest[i]))
        print(NOT_COUNTED)
    if given.chart is not None:
        memory.draw(plans, given.chart, budget=budget)
        print(f"wrote {given.chart}", file=sys.stderr if given.json else sys.stdout)
    return plans


def _config_of(path: str) -> Any:
    path = evaluate.resolve_checkpoint(path)
    with hub.loading("a configuration", path):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def as_json(
    plans: list[MethodPlan], budget: int, largest: list[int] | None = None
) -> dict[str, Any]:
    """The plans in bytes, by method."""
    methods = {}
    for i, p in enumerate(plans):
        methods[p.method] = {
            **{name: value for name, value in dataclasses.asdict(p).items() if name != "method"},
            "peak": p.peak,
            "fits": p.peak <= budget,
            "largest_batch": None if largest is None else largest[i],
        }
    return {"budget": budget, "methods": methods}


def way_out(p: MethodPlan, config: PPOConfig, budget: int, largest: int | None) -> str:
    """What a method that does not fit lacks, and what would make it smaller."""
    held = p.static + p.optimizer
    ways = []
    if held >= budget:
        lacks = f"weights, adapters and optimizer alone are {held / GB:.1f} GB, whatever the batch"
        if config.dtype != "bfloat16":
            ways.append("--dtype bfloat16")
        if p.method in ("ppo", "lora-ppo", "d-lora-ppo"):
            ways.append("hydra-ppo or j-hydra-ppo, which hold one model")
        if p.adapters:
            ways.append(f"--lora-r below {config.lora_r}")
        ways.append("FSDP over several cards, which splits the frozen weights")
    else:
        lacks = f"a batch of {p.batch_size} takes {p.peak / GB:.1f} GB in the {p.peak_phase} phase"
        if largest:
            ways.append(f"a batch of {largest}, with --gradient-accumulation-steps for more")
        elif p.batch_size > 1:
            ways.append("--per-device-train-batch-size 1 with --gradient-accumulation-steps")
        if not config.gradient_checkpointing:
            ways.append("--gradient-checkpointing")
        if p.adapters and config.lora_last_k is None:
            ways.append("--lora-last-k")
        ways.append("shorter prompts and responses")
    return f"{p.method} does not fit: {lacks}; try {', '.join(ways)}"


def table(plans: list[MethodPlan], budget: int, largest: list[int] | None = None) -> Table:
    """The plans side by side, in GB."""
    title = f"batch of {plans[0].batch_size}, GB; {budget / GB:.1f} GB to use"
    shown = Table(title=title)
    shown.add_column("")
    for p in plans:
        shown.add_column(p.method, justify="right")
    rows = (
        ("weights", "weights"),
        ("heads", "heads"),
        ("adapters", "adapters"),
        ("gradients", "gradients"),
        ("optimizer", "optimizer"),
        ("activations", "activations"),
        ("shared prefix", "prefix"),
        ("logits", "logits"),
        ("KV cache", "kv_cache"),
        ("peak of rollout", "rollout"),
        ("peak of score", "score"),
        ("peak of update", "update"),
    )
    for title, name in rows:
        if name == "rollout":
            shown.add_section()
        shown.add_row(title, *(f"{getattr(p, name) / GB:.3f}" for p in plans))
    shown.add_row("peak", *(f"{p.peak / GB:.3f}" for p in plans), style="bold")
    shown.add_row("fits", *("yes" if p.peak <= budget else "no" for p in plans))
    if largest is not None:
        shown.add_row("largest batch", *(str(batch) for batch in largest))
    return shown

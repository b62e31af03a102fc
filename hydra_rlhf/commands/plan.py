"""``hydra-rlhf plan``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from hydra_rlhf import hub, memory
from hydra_rlhf.config import METHODS, PPOConfig
from hydra_rlhf.errors import UserError
from hydra_rlhf.memory import MethodPlan
from hydra_rlhf.settings import required, setting

GB = 1e9


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
    batch_search: bool = setting(True, "also find the largest batch that fits, for each method")


ARGUMENTS = (PlanInput, PPOConfig)
POSITIONALS = ("model",)


def run(given: PlanInput, config: PPOConfig) -> list[MethodPlan]:
    """Prints a table; writes a chart where one is asked for."""
    if given.prompt_length < 2:
        raise UserError(f"prompt_length must be at least 2, got {given.prompt_length}")
    budget = int((given.card_gb - given.reserve_gb) * GB)
    if budget <= 0:
        raise UserError(f"card_gb {given.card_gb} is not above reserve_gb {given.reserve_gb}")
    if given.chart is not None and not Path(given.chart).resolve().parent.is_dir():
        raise UserError(f"chart: there is no folder {Path(given.chart).parent}")
    with hub.loading("a configuration", given.model):
        model_config = AutoConfig.from_pretrained(given.model, trust_remote_code=False)
    planner = memory.Planner(
        model_config,
        config,
        prompt_length=given.prompt_length,
        device=given.device,
        card=given.card_gb * GB,
    )
    plans = [planner.plan(method) for method in METHODS]
    largest = None
    if given.batch_search:
        largest = [planner.largest_batch(budget, method) for method in METHODS]
    Console().print(table(plans, budget, largest))
    if given.chart is not None:
        memory.draw(plans, given.chart, budget=budget)
        print(f"wrote {given.chart}")
    return plans


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

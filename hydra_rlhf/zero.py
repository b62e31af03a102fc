"""The optimizer of a run, split over its processes by DeepSpeed's ZeRO 1 and 2.

Under ``accelerate launch --use_deepspeed`` each process keeps its share of Adam's moments, and of a
float32 copy of what is trained, and updates that share; DeepSpeed gathers the new weights. What is
frozen stays whole in every process: FSDP splits that (``sharding.py``), and ZeRO 3 is refused.

Of DeepSpeed an engine gets the trained parameters and nothing else, one engine for each group of
the optimizer. An update here is several backward passes, over two models in some methods and with
microbatches that a process may halve alone, and it is clipped by role, or skipped, by the gradient
of all processes: so that gradient is summed as without DeepSpeed (``processes.py``) and goes to the
engines when it is whole. It costs one more sum of what is trained, and makes stage 2, which lets go
of parts of the gradient once they are summed, no smaller than stage 1 before that.

Settings are read by accelerate's plugin. Its engine wrapper is not used: it knows one model, and a
backward pass that is also the step.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, gather, patch_environment
from torch import Tensor, nn

from hydra_rlhf.errors import UserError

_STAGE_3 = (
    "this trainer does not run under ZeRO 3, which leaves every weight empty outside of its own "
    "module's forward, where the fused kernels read those of the heads: launch with --zero_stage "
    "2, or split the frozen weights by --use_fsdp --fsdp_version 2"
)
# What DeepSpeed's configuration may not decide, since it is decided here, and by what.
_OURS = {
    "optimizer": "--learning-rate and its like",
    "scheduler": "the flags of the schedule",
    "gradient_clipping": "--max-grad-norm",
    "gradient_accumulation_steps": "the flags of the batch",
    "train_batch_size": "the flags of the batch",
    "train_micro_batch_size_per_gpu": "the flags of the batch",
    "fp16": "--mixed-precision",
    "bf16": "--mixed-precision",
}
_NOTHING: tuple[Any, ...] = (None, "auto", 0, 0.0, {})


def is_asked_for() -> bool:
    """Whether the run was launched with DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def read_settings() -> dict[str, Any]:
    """DeepSpeed's configuration for an engine of trained parameters, as accelerate was told it.

    Raises:
        UserError: DeepSpeed is not installed, or it is to do what does not work here.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is not installed: pip install 'hydra-rlhf[deepspeed]'")
    try:
        found = dict(DeepSpeedPlugin().deepspeed_config)
    except (ValueError, OSError) as error:
        raise UserError(f"DeepSpeed's configuration: {error}") from error
    zero = {k: v for k, v in found.get("zero_optimization", {}).items() if v != "auto"}
    if zero.get("stage", 0) == 3:
        raise UserError(_STAGE_3)
    for name, instead in _OURS.items():
        given = found.pop(name, None)
        if name in ("fp16", "bf16"):
            given = (given or {}).get("enabled")
        once = name == "gradient_accumulation_steps" and given == 1
        if not once and given not in _NOTHING and given is not False:
            raise UserError(
                f"DeepSpeed's configuration sets {name}, which {instead} set here: leave it out, "
                'or set it to "auto"'
            )
    for name, devices in (("offload_param", ("none",)), ("offload_optimizer", ("none", "cpu"))):
        device = str((zero.get(name) or {}).get("device") or "none")
        if device not in devices:
            raise UserError(f"DeepSpeed's {name} to {device} needs ZeRO 3: {_STAGE_3}")
        if device == "none":
            zero.pop(name, None)
    return {
        **{name: value for name, value in found.items() if value != "auto"},
        "zero_optimization": {**zero, "round_robin_gradients": False},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # not its default, 1.0
        "zero_allow_untested_optimizer": True,
        # Offloading with torch's AdamW; DeepSpeed's own would be compiled first.
        "zero_force_ds_cpu_optimizer": False,
    }


def settings_of() -> dict[str, Any] | None:
    """:func:`read_settings` of a run whose optimizer is to be split; None where it is not."""
    if not is_asked_for() or not torch.distributed.is_initialized():
        return None
    settings = read_settings()
    return settings if settings["zero_optimization"].get("stage") else None


def make_accelerator(*, cpu: bool, mixed_precision: str) -> Accelerator:
    """accelerate's, as of a launch without DeepSpeed: it makes the processes and the precision."""
    with patch_environment(accelerate_use_deepspeed="false"):
        return Accelerator(cpu=cpu, mixed_precision=mixed_precision)


class ZeroOptimizer(torch.optim.Optimizer):
    """An optimizer whose state, and whose work, is split over the processes.

    ``param_groups`` are the given optimizer's: a schedule sets their rates. A group without any
    gradient is not stepped; in one that has some, a missing gradient is zero.

    Args:
        optimizer: Over the parameters, with no state yet. They are moved into DeepSpeed's storage.
        settings: See :func:`read_settings`.
        accelerator: Of the run.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, settings: dict[str, Any], accelerator: Accelerator
    ):
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups
        self._is_main = accelerator.is_main_process
        self._parts = [
            _Part(
                group,
                [p for p in group["params"] if p.dtype == dtype],
                type(optimizer),
                settings,
                accelerator,
            )
            for group in self.param_groups
            for dtype in dict.fromkeys(p.dtype for p in group["params"])
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """As of an optimizer that is not split, on the CPU. Every process has to ask for it.

        Returns:
            In the first process what any number of processes can load, with ZeRO and without;
            in the others the groups alone.
        """
        for part in self._parts:
            for parameter, state in part.whole_state():
                if self._is_main:
                    self.state[parameter] = state
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a whole state, and the parameters as they are now. In every process."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = {
            p: state_dict["state"].get(number, {})
            for p, number in zip(parameters, numbers, strict=True)
        }
        for part in self._parts:
            part.load([before[p] for p in part.parameters])


class _Part:
    """The parameters of one group and dtype, in an engine of their own."""

    def __init__(
        self,
        group: dict[str, Any],
        parameters: list[nn.Parameter],
        kind: type[Any],
        settings: dict[str, Any],
        accelerator: Accelerator,
    ):
        self.group = group
        self.parameters = parameters
        self.device = accelerator.device
        self.index, self.count = accelerator.process_index, accelerator.num_processes
        self.holder = _Holder(self.parameters)
        options = {k: v for k, v in group.items() if k != "params"}
        self.inner: Any = kind([{**options, "params": list(self.holder.parameters())}])
        self.engine = _initialize(self.holder, self.inner, settings, self.device)
        for parameter, held in zip(self.parameters, self.holder.parameters(), strict=True):
            parameter.data = held.data
        [self.share] = self.inner.param_groups[0]["params"]  # (flat / count,) float32
        if not torch.equal(self.share, self._share_of(self.parameters)):
            raise RuntimeError("this version of DeepSpeed lays out parameters otherwise")

    def step(self) -> None:
        if all(p.grad is None for p in self.parameters):
            return
        self.inner.param_groups[0].update({k: v for k, v in self.group.items() if k != "params"})
        for parameter in self.parameters:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.holder.given.append(grad)
            parameter.grad = None
        with torch.enable_grad():
            self.engine.backward(self.engine())
        self.engine.step()
        # Written through DeepSpeed's storage, which autograd and caches of weights cannot see.
        torch.autograd.graph.increment_version(self.parameters)

    def whole_state(self) -> list[tuple[nn.Parameter, dict[str, Tensor]]]:
        """Every process's share put together: a state for each parameter, or none before a step."""
        state = dict(self.inner.state.get(self.share, {}))
        if not state:
            return []
        steps = state.pop("step")
        if self.parameters[0].dtype != torch.float32:
            state["master"] = self.share.detach()
        whole: dict[str, list[Tensor]] = {}
        for name, share in state.items():
            flat = gather(share.to(self.device)).cpu()
            parts = flat[: self._numel].split([p.numel() for p in self.parameters])
            whole[name] = [t.view(p.shape) for t, p in zip(parts, self.parameters, strict=True)]
        return [
            (p, {"step": steps.clone().cpu()} | {name: whole[name][i].clone() for name in whole})
            for i, p in enumerate(self.parameters)
        ]

    def load(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Takes this process's share of each parameter's state; {} is the state before a step."""
        self.share.copy_(self._share_of(self.parameters))
        self.inner.state.pop(self.share, None)
        full = next((state for state in states if state), None)
        if full is None:
            return
        mine: dict[str, Tensor] = {}
        for name in full:
            if name == "step":
                mine[name] = full[name].clone().float().to(self.share.device)
                continue
            pairs = zip(states, self.parameters, strict=True)
            values = [state.get(name, torch.zeros_like(p)) for state, p in pairs]
            mine[name] = self._share_of(values).clone()
        master = mine.pop("master", None)
        if master is not None:
            self.share.copy_(master)
        self.inner.state[self.share] = mine

    @property
    def _numel(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def _share_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """This process's part of tensors shaped as the parameters, laid out as DeepSpeed does."""
        size = self.share.numel()
        start, stop = self.index * size, (self.index + 1) * size
        out = torch.zeros_like(self.share)
        at = 0
        for tensor in tensors:
            low, high = max(start, at), min(stop, at + tensor.numel())
            if low < high:
                out[low - start : high - start] = tensor.detach().flatten()[low - at : high - at]
            at += tensor.numel()
        return out


class _Holder(nn.Module):
    """Trained parameters under other names, so that what DeepSpeed hangs on them is its own.

    Its forward and backward give the engine the gradients that are ``given``.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        super().__init__()
        self.held = nn.ParameterList(nn.Parameter(p.detach()) for p in parameters)
        self.given: list[Tensor] = []

    def forward(self) -> Tensor:
        return _Give.apply(self, *self.held)


class _Give(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, holder: _Holder, *held: Tensor) -> Tensor:  # type: ignore[override]
        ctx.holder = holder
        return held[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given, ctx.holder.given = ctx.holder.given, []
        return (None, *given)


def _initialize(
    holder: _Holder, optimizer: torch.optim.Optimizer, settings: dict[str, Any], device: Any
) -> Any:
    import deepspeed

    if device.type == "cpu":
        # Its C++ collectives for a CPU would be compiled now; gloo is there.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch's, of a name that DeepSpeed still calls, in every process.
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor", category=FutureWarning)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    engine, *_ = deepspeed.initialize(model=holder, optimizer=optimizer, config=settings)
    return engine

"""How much memory each method takes, told before anything is loaded.

The models are built on torch's meta device, where tensors have shapes and no storage, and the very
code of ``ppo.py`` runs on them: scoring, a forward and backward of each microbatch. A ledger under
the dispatcher adds every storage when it is made and takes it off when nothing holds it any more,
so that what autograd keeps, and for how long, is what it keeps in the real run, for any family of
models. Three things that a meta tensor cannot run stand in with the shapes and lifetimes of the
kernels: the adapted linear layer, the output head and scaled dot-product attention.

What is added up by formula: weights, adapters, optimizer states (exact), and generation (the KV
cache, one prefill and a step's logits).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers.pytorch_utils import Conv1D

from hydra_kernels.ops.linear_logprob import LinearLogprob
from hydra_rlhf import ppo
from hydra_rlhf import trunk as trunks
from hydra_rlhf.config import METHODS, PPOConfig
from hydra_rlhf.errors import UserError
from hydra_rlhf.methods import MethodModels, lora_config_of
from hydra_rlhf.model import ROLES, HydraModel
from hydra_rlhf.rollout import Rollout

META = torch.device("meta")
# Rows and columns of the block of logits that a kernel holds at a time (csrc and Triton tiles are
# smaller; the CPU's are these).
_LOGIT_ROWS, _LOGIT_COLUMNS = 1024, 2048
PHASES = ("rollout", "score", "update")


@dataclass(frozen=True)
class MethodPlan:
    """Bytes of one method at one batch size.

    Attributes:
        method: Its name.
        batch_size: Sequences in a rollout.
        weights: Frozen and trained decoders, every copy that the method holds.
        heads: Reward and value heads.
        adapters: LoRA factors.
        gradients: Of everything trained.
        optimizer: Adam's two moments.
        prefix: Shared activations kept for a rollout.
        kv_cache: Of generation at full length.
        logits: Of one step of generation, and the block that scoring holds.
        activations: What the update phase holds above gradients at its worst moment.
        rollout, score, update: Peak of each phase, everything held included.
    """

    method: str
    batch_size: int
    weights: int
    heads: int
    adapters: int
    gradients: int
    optimizer: int
    prefix: int
    kv_cache: int
    logits: int
    activations: int
    rollout: int
    score: int
    update: int

    @property
    def static(self) -> int:
        """Held from start to end before any optimizer state: weights, heads, adapters."""
        return self.weights + self.heads + self.adapters

    @property
    def peak(self) -> int:
        return max(self.rollout, self.score, self.update)


def plan(
    model_config: transformers.PretrainedConfig,
    config: PPOConfig,
    *,
    method: str | None = None,
    prompt_length: int = 512,
) -> MethodPlan:
    """The memory of one method for a model.

    Args:
        model_config: transformers' configuration of the decoder.
        config: Batch sizes, lengths, rank, dtype, checkpointing and reuse, as for a run.
        method: In place of ``config.method``.
        prompt_length: Width of the padded prompts.

    Raises:
        UserError: the configuration cannot work, or the model has no known blocks.
    """
    config = replace(config, method=method or config.method)
    config.validate()
    try:
        models = _models_on_meta(model_config, config)
    except (ValueError, NotImplementedError) as e:
        raise UserError(f"cannot plan for {model_config.model_type}: {e}") from e
    held = _bytes(p for model in models for p in [*model.parameters(), *model.buffers()])
    heads = _bytes(p for m in models for h in (m.reward_head, m.value_head) for p in h.parameters())
    adapters = _bytes(p for m in models for n, p in m.base.named_parameters() if "lora_" in n)
    trained = [*models.actor_parameters(), *models.critic_parameters()]
    gradients = _bytes(trained)
    optimizer = 2 * gradients

    B, T = config.local_batch_size, config.response_length
    chunk = min(B, config.local_rollout_forward_batch_size)
    ledger = Ledger()
    rollout = _rollout(chunk, prompt_length, T)
    with torch.no_grad(), ledger:
        prefixes = ppo.shared_prefixes(config, models, rollout)
    prefix_chunk = sum(p.nbytes for p in prefixes.values())
    ledger.restart(prefix_chunk)
    with torch.no_grad(), ledger:
        size = config.local_rollout_forward_batch_size
        ppo.score_by(size, config, models, rollout, prefixes, ROLES)
    score_peak = ledger.peak - prefix_chunk
    del prefixes
    update_peak = _update_peak(config, models, prompt_length)
    with torch.no_grad():
        prompts = _rollout(B, prompt_length - 1, 1)
        ledger.restart()
        with ledger:
            models.actor.hidden(prompts.query_responses, prompts.attention_mask, role="actor")
        prefill = ledger.peak
    prefix = 0
    if config.share_prefix:
        prefix = prefix_chunk * B // chunk
    device_prefix = 0 if config.prefix_device == "cpu" else prefix
    if config.prefix_device == "auto" and prefix > config.prefix_budget_gb * 1e9:
        device_prefix = 0

    text = model_config.get_text_config()
    itemsize = models.actor.trunk.dtype.itemsize
    kv_row = _kv_bytes(text, itemsize)  # of one token
    kv_cache = B * (prompt_length + T) * kv_row
    # A cache that grows by concatenation holds one layer's old and new tensors at once. float32
    # logits of a step are held as read, divided by the temperature, and as probabilities.
    growing = kv_cache // (2 * text.num_hidden_layers)
    step_logits = 3 * B * text.vocab_size * 4
    rollout_peak = max(kv_cache + growing + step_logits, prefill + B * prompt_length * kv_row)
    rows = min(_LOGIT_ROWS, chunk * T)
    block = 2 * rows * min(_LOGIT_COLUMNS, text.vocab_size) * 4
    static = held + optimizer
    return MethodPlan(
        method=config.method,
        batch_size=B,
        weights=held - heads - adapters,
        heads=heads,
        adapters=adapters,
        gradients=gradients,
        optimizer=optimizer,
        prefix=prefix,
        kv_cache=kv_cache,
        logits=max(step_logits, block),
        activations=max(update_peak - gradients, 0),
        rollout=static + rollout_peak,
        score=static + device_prefix + score_peak,
        update=static + device_prefix + update_peak,
    )


def plan_methods(
    model_config: transformers.PretrainedConfig,
    config: PPOConfig,
    *,
    prompt_length: int = 512,
    methods: tuple[str, ...] = METHODS,
) -> list[MethodPlan]:
    """:func:`plan` of each method, for one configuration otherwise."""
    return [plan(model_config, config, method=m, prompt_length=prompt_length) for m in methods]


def largest_batch(
    model_config: transformers.PretrainedConfig,
    config: PPOConfig,
    budget: int,
    *,
    method: str | None = None,
    prompt_length: int = 512,
) -> int:
    """Most sequences a microbatch and a rollout can have within ``budget`` bytes; 0 for none.

    Every phase grows with the batch by a constant a sequence, so two plans give the line.
    """

    def at(batch: int) -> MethodPlan:
        sized = replace(
            config,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            local_rollout_forward_batch_size=batch,
        )
        return plan(model_config, sized, method=method, prompt_length=prompt_length)

    # Above the sizes at which a kernel's block of logits is still growing.
    low, high = at(8), at(16)
    if low.peak > budget:
        best = 0
        for batch in range(1, 8):
            if at(batch).peak > budget:
                break
            best = batch
        return best
    best = 10**9
    for phase in PHASES:
        a, b = getattr(low, phase), getattr(high, phase)
        slope = max((b - a) / 8, 1.0)
        best = min(best, 8 + int((budget - a) / slope))
    return best


# The ledger


class Ledger(TorchDispatchMode):
    """Counts the bytes of storages made inside it that are still held, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.restart()

    def restart(self, live: int = 0) -> None:
        self.live = self.peak = live
        self._known: Any = WeakIdKeyDictionary()
        self._round = object()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Views and in-place results share a storage that is there already.
        before = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in before and storage not in self._known:
                self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        size = storage.nbytes()
        self._known[storage] = weakref.finalize(storage, self._free, size, self._round)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, size: int, round_: object) -> None:
        if round_ is self._round:
            self.live -= size


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes(parameters: Any) -> int:
    """Of distinct tensors: a tied head counts once."""
    distinct = {id(p): p for p in parameters}
    return sum(p.numel() * p.element_size() for p in distinct.values())


# Models without storage


def _models_on_meta(model_config: transformers.PretrainedConfig, config: PPOConfig) -> MethodModels:
    dtype = config.dtype or getattr(model_config, "dtype", None) or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)

    def make(*adapters: str, frozen: bool = False) -> _PlannedModel:
        with META:
            lm = transformers.AutoModelForCausalLM.from_config(model_config, dtype=dtype)
        model = _PlannedModel(lm.eval(), adapters, config)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": config.use_reentrant})
        return model.requires_grad_(False) if frozen else model

    method = config.method
    if method in ("ppo", "lora-ppo"):
        on = method == "lora-ppo"
        return MethodModels(
            method,
            make(*(("actor",) if on else ())),
            make(*(("critic",) if on else ())),
            make(frozen=True),
            make(frozen=True),
        )
    if method == "d-lora-ppo":
        actor, critic = make("actor"), make("critic")
        return MethodModels(method, actor, critic, actor, critic)
    one = make("joint") if method == "j-hydra-ppo" else make("actor", "critic")
    return MethodModels(method, one, one, one, one)


class _PlannedModel(HydraModel):
    """A HydraModel on the meta device, with stand-ins for the fused layers and the head."""

    active: list[tuple[str, ...]]  # a stack: the adapters that run now

    def __init__(self, lm: Any, adapters: tuple[str, ...], config: PPOConfig):
        super().__init__(lm)
        self.adapters = tuple(adapters)
        self.__dict__["lm_head"] = _PlannedHead(lm.get_output_embeddings())
        self.__dict__["active"] = []
        if adapters:
            lm.requires_grad_(False)
            lora = lora_config_of(config, lm)
            targets = set(lora.target_modules)
            for i, block in enumerate(trunks.blocks(self.trunk)):
                if lora.layers_to_transform is None or i in lora.layers_to_transform:
                    self._adapt(block, targets, lora.r)

    def _adapt(self, block: nn.Module, targets: set[str], rank: int) -> None:
        for name, module in list(block.named_modules()):
            last = name.rsplit(".", 1)[-1]
            if last in targets and isinstance(module, (nn.Linear, Conv1D)):
                parent = block.get_submodule(name.rsplit(".", 1)[0]) if "." in name else block
                setattr(parent, last, _PlannedLinear(module, self.adapters, rank, self.active))

    @property
    def causal_lm(self) -> Any:
        return self.base

    def _adapter_index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.adapters)}

    @contextlib.contextmanager
    def _adapters(self, ids: int | Tensor) -> Iterator[None]:  # type: ignore[override]
        names: tuple[str, ...] = self.adapters
        if not isinstance(ids, Tensor):
            names = () if ids < 0 else (self.adapters[ids],)
        self.active.append(names)
        try:
            # Here and not around the plan, because backward recomputes blocks in a thread where
            # the modes of the caller are off.
            with _Answers():
                yield
        finally:
            self.active.pop()


class _PlannedLinear(nn.Module):
    active: list[tuple[str, ...]]

    def __init__(self, base: Any, adapters: tuple[str, ...], rank: int, active: list):
        super().__init__()
        self.base_layer = base
        K, N = base.weight.shape
        if isinstance(base, nn.Linear):
            N, K = K, N
        self.N = N
        # PEFT keeps the adapters of a half-precision model in float32.
        dtype = torch.float32 if base.weight.dtype in (torch.float16, torch.bfloat16) else None
        settings: Any = {"bias": False, "device": META, "dtype": dtype or base.weight.dtype}
        self.lora_A = nn.ModuleDict({n: nn.Linear(K, rank, **settings) for n in adapters})
        self.lora_B = nn.ModuleDict({n: nn.Linear(rank, N, **settings) for n in adapters})
        self.__dict__["active"] = active

    def forward(self, x: Tensor) -> Tensor:
        names = self.active[-1] if self.active else ()
        if not names:
            return self.base_layer(x)
        factors = [getattr(self, side)[n].weight for side in ("lora_A", "lora_B") for n in names]
        return _LoraShapes.apply(x, self.N, *factors)


class _LoraShapes(torch.autograd.Function):
    """The fused layer keeps x, and makes the rank-R product again in backward."""

    @staticmethod
    def forward(ctx, x, N, *factors):
        ctx.save_for_backward(x, *factors)
        ctx.N = N
        rank = sum(f.shape[0] for f in factors[: len(factors) // 2])
        shrunk = x.new_empty(*x.shape[:-1], rank, dtype=factors[0].dtype)
        y = x.new_empty(*x.shape[:-1], N)
        del shrunk
        return y

    @staticmethod
    def backward(ctx, dy):
        x, *factors = ctx.saved_tensors
        rank = sum(f.shape[0] for f in factors[: len(factors) // 2])
        work = [x.new_empty(*x.shape[:-1], rank, dtype=factors[0].dtype) for _ in range(2)]
        grads = [torch.empty_like(f) for f in factors]
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        del work
        return dx, None, *grads


class _PlannedHead:
    """``LMHead`` whose log-probabilities are shapes."""

    def __init__(self, head: Any):
        self.weight, self.bias = head.weight, getattr(head, "bias", None)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.new_empty(*hidden.shape[:-1], self.weight.shape[0])

    def logprob(self, hidden, targets, *, temperature=1.0, ref_hidden=None) -> LinearLogprob:
        D = hidden.shape[-1]
        reference = None if ref_hidden is None else ref_hidden.reshape(-1, D)
        out = _LogprobShapes.apply(hidden.reshape(-1, D), self.weight, reference)
        logprobs, entropy, logsumexp, ref, kl = (part.view(targets.shape) for part in out)
        if ref_hidden is None:
            return LinearLogprob(logprobs, entropy, logsumexp, None, None)
        return LinearLogprob(logprobs, entropy, logsumexp, ref, kl)


class _LogprobShapes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, reference):
        M, V = hidden.shape[0], weight.shape[0]
        shape = (min(M, _LOGIT_ROWS), min(V, _LOGIT_COLUMNS))
        blocks = [hidden.new_empty(shape, dtype=torch.float32)]
        if reference is not None:
            blocks.append(hidden.new_empty(shape, dtype=torch.float32))
        # Five results and four sums that backward needs.
        out = hidden.new_empty(5, M, dtype=torch.float32).unbind(0)
        sums = hidden.new_empty(4, M, dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, reference, sums)
        del blocks
        return tuple(part.clone() for part in out)

    @staticmethod
    def backward(ctx, *grads):
        hidden, weight, _, _ = ctx.saved_tensors
        M, V = hidden.shape[0], weight.shape[0]
        shape = (min(M, _LOGIT_ROWS), min(V, _LOGIT_COLUMNS))
        block = hidden.new_empty(shape, dtype=torch.float32)
        dhidden = torch.empty_like(hidden)
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        del block
        return dhidden, dweight, None


class _AttentionShapes(torch.autograd.Function):
    """A fused attention: keeps its inputs, its output and a log-sum-exp a row."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty_like(mask, dtype=q.dtype)  # torch adds masks, so makes them floats
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class _Answers(TorchFunctionMode):
    """Answers what has no answer on the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            return _AttentionShapes.apply(q, k, v, kwargs.get("attn_mask"))
        if func is Tensor.__bool__ and args[0].is_meta:
            return False  # "is the mask all ones", "is there a NaN"
        return func(*args, **kwargs)


def _rollout(B: int, P: int, T: int) -> Rollout:
    with META:
        return Rollout(
            torch.empty(B, P + T, dtype=torch.long),
            torch.empty(B, P + T, dtype=torch.long),
            torch.empty(B, T, dtype=torch.bool),
            torch.empty(B, dtype=torch.bool),
        )


class _NoAccelerator:
    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


def _update_peak(config: PPOConfig, models: MethodModels, prompt_length: int) -> int:
    """Peak of one optimizer step's gradients and activations.

    Two microbatches are enough where there are more: the second runs beside full gradients.
    """
    micro = config.per_device_train_batch_size
    rows = min(2 * micro, config.local_mini_batch_size)
    rollout = _rollout(rows, prompt_length, config.response_length)
    ledger = Ledger()
    with torch.no_grad():
        prefixes = ppo.shared_prefixes(config, models, rollout)
    with META:
        per_token = torch.empty(rows, config.response_length)
    experience = ppo.Experience(rollout, per_token, per_token, per_token, per_token, prefixes)
    trained = [*models.actor_parameters(), *models.critic_parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    accelerator: Any = _NoAccelerator()
    with ledger:
        for part in torch.arange(rows).split(micro):
            for loss, _ in ppo.ppo_losses(
                config, models, experience, part, part.to(META), accelerator, critic_only=False
            ):
                loss.backward()
    for parameter in trained:
        parameter.grad = None
    return ledger.peak


def _kv_bytes(text: Any, itemsize: int) -> int:
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_dim * itemsize


# Pictures


def draw(plans: list[MethodPlan], path: str | Path, *, budget: int | None = None) -> None:
    """A bar a method, stacked by what the bytes are for, as a PNG.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as e:
        raise UserError("the chart needs matplotlib: pip install 'hydra-rlhf[plot]'") from e
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    parts = ("weights", "adapters", "optimizer", "gradients", "activations", "prefix", "kv_cache")
    left = [0.0] * len(plans)
    names = [p.method for p in plans]
    for part in parts:
        widths = [getattr(p, part) / 1e9 for p in plans]
        axes.barh(names, widths, left=left, label=part.replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.plot([p.peak / 1e9 for p in plans], names, "k|", markersize=24, label="peak of a phase")
    if budget is not None:
        axes.axvline(budget / 1e9, color="black", linestyle="--", label="the card")
    axes.invert_yaxis()
    axes.set_xlabel("GB (1e9 bytes); phases do not hold all parts at once")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""Models without storage, to be run under a ledger.

For ``memory.py``: tensors on torch's meta device have shapes and no storage, so that what autograd
keeps, and for how long, is what it keeps in the real run, for any family of models. Three things
that a meta tensor cannot run stand in with the shapes and lifetimes of the kernels: the adapted
linear layer, the output head and scaled dot-product attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from hydra_kernels.ops.linear_logprob import LinearLogprob
from hydra_kernels.ops.logprob_memory import LogprobMemory, linear_logprob_memory
from hydra_rlhf import trunk as trunks
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.ledger import Ledger, put_twins
from hydra_rlhf.methods import MethodModels, lora_config_of
from hydra_rlhf.model import HydraModel

META = torch.device("meta")


# Models without storage


def models_on_meta(
    model_config: transformers.PretrainedConfig,
    config: PPOConfig,
    ledger: Ledger,
    *,
    reward_config: transformers.PretrainedConfig | None = None,
    device: str = "cuda",
    twins: bool = True,
) -> MethodModels:
    """The models of a method without storage. No reward model is held beside a reward function.

    Args:
        model_config: Of the decoder.
        config: Method, dtype, adapters and checkpointing.
        ledger: Under which they will be run.
        reward_config: Of a separate reward model, from which the critic starts too.
        device: Whose kernels they stand for.
        twins: Leave out blocks that the ledger can fill in.
    """

    def make(
        kind: transformers.PretrainedConfig, *adapters: str, frozen: bool = False
    ) -> _PlannedModel:
        dtype = config.dtype or getattr(kind, "dtype", None) or torch.float32
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        with META:
            lm = transformers.AutoModelForCausalLM.from_config(kind, dtype=dtype)
        model = _PlannedModel(lm.eval(), adapters, config, device)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": config.use_reentrant})
        if frozen:
            model.requires_grad_(False)
        masked = lm.config.get_text_config()._attn_implementation in ("sdpa", "eager")
        if twins:
            put_twins(trunks.blocks(model.trunk), ledger, masked=masked)
        return model

    method, rm_config = config.method, reward_config or model_config
    use_head = config.reward_fn is None
    if method in ("ppo", "lora-ppo"):
        on = method == "lora-ppo"
        return MethodModels(
            method,
            make(model_config, *(("actor",) if on else ())),
            make(rm_config, *(("critic",) if on else ())),
            make(model_config, frozen=True),
            make(rm_config, frozen=True) if use_head else None,
        )
    if method == "d-lora-ppo":
        actor, critic = make(model_config, "actor"), make(rm_config, "critic")
        return MethodModels(method, actor, critic, actor, critic if use_head else None)
    names = ("joint",) if method == "j-hydra-ppo" else ("actor", "critic")
    one = make(model_config, *names)
    return MethodModels(method, one, one, one, one if use_head else None)


class _PlannedModel(HydraModel):
    """A HydraModel on the meta device, with stand-ins for the fused layers and the head."""

    active: list[tuple[str, ...]]  # a stack: the adapters that run now

    def __init__(self, lm: Any, adapters: tuple[str, ...], config: PPOConfig, device: str):
        super().__init__(lm)
        self.adapters = tuple(adapters)
        self.__dict__["lm_head"] = _PlannedHead(lm.get_output_embeddings(), device)
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
        for name, shape in (("lora_A", (K, rank)), ("lora_B", (rank, N))):
            factors = {n: skip_init(nn.Linear, *shape, **settings) for n in adapters}
            setattr(self, name, nn.ModuleDict(factors))
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

    def __init__(self, head: Any, device: str):
        self.weight, self.bias = head.weight, getattr(head, "bias", None)
        self.device = device  # whose kernels stand behind it

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.new_empty(*hidden.shape[:-1], self.weight.shape[0])

    def logprob(self, hidden, targets, *, temperature=1.0, ref_hidden=None) -> LinearLogprob:
        D = hidden.shape[-1]
        reference = None if ref_hidden is None else ref_hidden.reshape(-1, D)
        rows = hidden.reshape(-1, D)
        held = linear_logprob_memory(
            rows.shape[0],
            D,
            self.weight.shape[0],
            rows.dtype,
            device=self.device,
            reference=reference is not None,
            differentiated=torch.is_grad_enabled()
            and (rows.requires_grad or self.weight.requires_grad),
        )
        out = _LogprobShapes.apply(rows, self.weight, reference, held)
        logprobs, entropy, logsumexp, ref, kl = (part.view(targets.shape) for part in out)
        if ref_hidden is None:
            return LinearLogprob(logprobs, entropy, logsumexp, None, None)
        return LinearLogprob(logprobs, entropy, logsumexp, ref, kl)


class _LogprobShapes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, reference, held: LogprobMemory):
        M = hidden.shape[0]
        kept = hidden.new_empty(held.kept, dtype=torch.uint8)
        work = hidden.new_empty(held.forward, dtype=torch.uint8)
        # Five results, and four sums and two of the results once more, for backward.
        out = hidden.new_empty(5, M, dtype=torch.float32).unbind(0)
        sums = hidden.new_empty(6, M, dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, reference, sums, kept)
        ctx.held = held
        del work
        return tuple(part.clone() for part in out)

    @staticmethod
    def backward(ctx, *grads):
        hidden, weight, *_ = ctx.saved_tensors
        work = hidden.new_empty(ctx.held.backward, dtype=torch.uint8)
        dhidden = torch.empty_like(hidden)
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        del work
        return dhidden, dweight, None, None


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

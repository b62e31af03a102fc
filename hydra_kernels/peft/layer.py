"""PEFT's LoRA linear layer with a forward on :func:`hydra_kernels.lora_linear`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners import lora
from peft.tuners.lora import variants
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from hydra_kernels.ops.lora_alone import alone
from hydra_kernels.ops.lora_linear import gated_linear
from hydra_kernels.peft.current import NO_BACKWARD, Current, Usage, backward_pass

if TYPE_CHECKING:
    from hydra_kernels.peft.siblings import Group

# The dropout probability of the adapters, the weight (N, K), the bias, and each adapter's lora_A,
# lora_B and scaling.
Ready = tuple[float, Tensor, Tensor | None, list[Tensor], list[Tensor], list[float | Tensor]]


class FusedLinear(lora.Linear):
    """PEFT's ``lora.Linear``, running on :func:`hydra_kernels.lora_linear` where that fits.

    PEFT's own forward runs, unchanged, for a merged or disabled layer, ``adapter_names``, variants
    (DoRA, aLoRA, ...), biases of lora_B, several active adapters under dropout, a base that is not
    exactly ``nn.Linear`` or ``Conv1D`` or has a tensor subclass for a weight, hooks or an
    instance's own forward on a submodule, tensors on meta, and within torch.func's transforms.
    """

    # Shadowed on the instance when the model is first given ids.
    _current = Current()
    _usage = Usage()
    _group: Group | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        current = self._current.now
        if current.entered_in == NO_BACKWARD and self._usage.used:
            self._refuse_unknown_ids()
        if current.ids is not None and not self._disable_adapters:
            # A compiled graph reads even an int on the device: the next one must not recompile it.
            index = current.index
            if not torch.compiler.is_compiling() and current.only is not None:
                index = current.only
            return self._gated_forward(x, current.ids, index, *args, **kwargs)
        if args or kwargs or self._disable_adapters or self.merged_adapters:
            return super().forward(x, *args, **kwargs)
        names, owners = self.adapters(None)
        ready = self.ready(x, names)
        if not names or ready is None or (ready[0] > 0.0 and len(names) > 1):
            return super().forward(x)
        return self._fast_forward(x, names, owners, None, None, ready, len(names))

    def _replicate_for_data_parallel(self) -> Any:
        if self._current.now.ids is not None:
            raise RuntimeError(
                "adapter_ids are seen by the thread that entered them alone, and DataParallel runs "
                "its replicas in others: use DistributedDataParallel"
            )
        return super()._replicate_for_data_parallel()

    def _get_name(self) -> str:
        return "Linear"  # PEFT's own writes lora.Linear, which programs look for

    def extra_repr(self) -> str:
        return "fused"

    def _refuse_unknown_ids(self) -> None:
        if backward_pass() != NO_BACKWARD:
            raise RuntimeError(
                "a checkpointed forward pass is recomputed in backward, and which adapter ids it "
                "had is not known: checkpoint with hydra_kernels.peft.checkpoint or wrap the "
                "function in keep_adapter_ids, or enable gradient checkpointing before the first "
                "adapter_ids"
            )

    def adapters(self, index: Mapping[str, int] | None) -> tuple[list[str], Sequence[int]]:
        """The adapters that the layer has of those in ``index``, or active in PEFT; their ids."""
        lora_a = self._modules["lora_A"]._modules
        if index is None:
            active = self._active_adapter
            if isinstance(active, str):
                return ([active], _FIRST) if active in lora_a else ([], ())
            names = [name for name in active if name in lora_a]
            return names, range(len(names))
        names = [name for name in index if name in lora_a]
        return names, [index[name] for name in names]

    def ready(self, x: Tensor, names: list[str]) -> Ready | None:
        """What the fused product of x and the adapters takes; None where PEFT's code has to run."""
        modules = self._modules
        base = modules["base_layer"]
        kind = type(base)
        parameters = base._parameters
        weight = parameters.get("weight")
        if (
            (kind not in BASES and not is_base(base))
            or not is_bare(base)
            or not (type(weight) in _PLAIN and type(x) in _PLAIN)
            or x.is_meta  # which torch does not tell about autocast
            or _has_any_global_hook()
            or (_are_functorch_transforms_active() and not torch.compiler.is_compiling())
        ):
            return None
        device, dtype, bias = x.device, x.dtype, parameters["bias"]
        # Asking about any device first is faster, and what compilers do not trace.
        autocast = (
            torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()
        ) and torch.is_autocast_enabled(device.type)
        if not autocast and (
            dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype)
        ):
            return None
        lora_a, lora_b = modules["lora_A"]._modules, modules["lora_B"]._modules
        drops = modules["lora_dropout"]._modules
        ready: Ready = (0.0, weight.t() if kind is Conv1D else weight, bias, [], [], [])
        _, _, _, a_weights, b_weights, scales = ready
        found: float | None = None
        for name in names:
            a, b, drop = lora_a[name], lora_b[name], drops[name]
            if (
                type(a) is not nn.Linear
                or type(b) is not nn.Linear
                or type(drop) not in DROPOUTS
                or not (is_bare(a) and is_bare(b) and is_bare(drop))
                or name in self.lora_variant
                or b._parameters["bias"] is not None
                or a._parameters["bias"] is not None
            ):
                return None
            a_weight, b_weight = a._parameters.get("weight"), b._parameters.get("weight")
            if not (type(a_weight) in _PLAIN and type(b_weight) in _PLAIN):
                return None
            if found is None:
                dtype = a_weight.dtype
            if (
                a_weight.dtype != dtype
                or b_weight.dtype != dtype
                or a_weight.device != device
                or b_weight.device != device
            ):
                return None
            scale = self.scaling[name]
            if isinstance(scale, Tensor) and (scale.requires_grad or scale.numel() != 1):
                return None
            p = drop.p if drop.training and type(drop) is nn.Dropout else 0.0
            if found is not None and p != found:
                return None
            found = p
            a_weights.append(a_weight)
            b_weights.append(b_weight)
            scales.append(scale)
        if dtype != x.dtype and not (self.cast_input_dtype_enabled or autocast):
            return None  # PEFT multiplies without a cast, which torch refuses
        return (found, *ready[1:]) if found else ready

    def _fast_forward(
        self,
        x: Tensor,
        names: list[str],
        owners: Sequence[int],
        ids: Tensor | None,
        index: Mapping[str, int] | None,
        ready: Ready,
        num_adapters: int,
    ) -> Tensor:
        dropout, weight, bias, a, b, scales = ready
        if (
            self._group is not None
            and dropout == 0.0  # PEFT drops other elements of x for each layer, a group the same
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        ):
            y = self._group.forward(self, x, names, owners, ids, index, ready, num_adapters)
            if y is not None:
                return y
        if ids is None and len(a) == 1 and not torch.compiler.is_compiling():
            y = alone(x, weight, bias, a[0], b[0], scales[0], dropout)
            if y is not None:
                return y
        return gated_linear(
            x, weight, bias, a, b, scales, owners, ids, dropout, num_adapters=num_adapters
        )

    def _gated_forward(
        self, x: Tensor, ids: Tensor, index: Mapping[str, int], *args: Any, **kwargs: Any
    ) -> Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names and hydra_kernels.peft.adapter_ids exclude each other")
        if self.merged_adapters:
            raise ValueError("adapter_ids: these adapters are merged, call unmerge_adapter first")
        if ids.device != x.device:
            ids = ids.to(x.device)
        names, owners = self.adapters(index)
        if ids.dim() > 0:
            ids = self._spread(ids, x)
        ready = None if args or kwargs else self.ready(x, names)
        if ready is not None:
            if not names:
                return self.base_layer(x)
            everywhere = not torch.compiler.is_compiling() and index is self._current.now.only
            on_rows = None if everywhere else ids
            return self._fast_forward(
                x, names, owners, on_rows, index, ready, len(self._current.now.index)
            )
        return self._gated_by_peft(x, ids, names, index, *args, **kwargs)

    def _spread(self, ids: Tensor, x: Tensor) -> Tensor:
        """``ids`` for the rows of a layer whose input (B, T) was flattened, as OPT's MLP does."""
        compiling = torch.compiler.is_compiling()
        if ids.dim() < x.dim() and ids.shape == x.shape[: ids.dim()]:
            if x.dim() > 2 and not compiling:
                self._current.now.tokens = x.shape[:-1].numel()
            return ids
        rows = x.shape[0]
        # Routed experts see rows in another order: only as many as the sequences have are theirs.
        whole = rows % max(ids.numel(), 1) == 0 if compiling else rows == self._current.now.tokens
        if x.dim() != 2 or not whole or ids.numel() == 0:
            raise ValueError(
                f"adapter_ids: {tuple(ids.shape)} is no leading part of {tuple(x.shape[:-1])} "
                "(beams and num_return_sequences repeat rows: ids.repeat_interleave(times))"
            )
        return ids.reshape(-1, 1).expand(-1, rows // ids.numel()).reshape(-1)

    def _gated_by_peft(
        self,
        x: Tensor,
        ids: Tensor,
        names: list[str],
        index: Mapping[str, int],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """One adapter after the other on every row, each kept only where its id stands."""
        variant_kwargs = {key: kwargs.pop(key, None) for key in _VARIANT_KWARGS}
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        on_rows = ids.view(ids.shape + (1,) * (x.dim() - ids.dim()))
        for name in names:
            lora_a = self.lora_A[name]
            inputs = self._cast_input_dtype(x, lora_a.weight.dtype)
            if name in self.lora_variant:
                variant = self.lora_variant[name]
                if isinstance(variant, _ALORA):
                    raise ValueError(
                        f"adapter_ids: {name} is an aLoRA, whose rows PEFT finds by the invocation "
                        "tokens of its active adapter: use set_adapter"
                    )
                # A copy, which variants may change in place.
                adapted = variant.forward(
                    self,
                    active_adapter=name,
                    x=inputs,
                    result=result.clone(),
                    **variant_kwargs,
                    **kwargs,
                )
            else:
                delta = self.lora_B[name](lora_a(self.lora_dropout[name](inputs)))
                adapted = result + delta * self.scaling[name]
            result = torch.where(on_rows == index[name], adapted, result)
        return result.to(dtype)


# torch.func's transforms see through plain operators, not through the fused ones.
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active
# PEFT 0.17 knows no arguments of variants.
_VARIANT_KWARGS = getattr(lora.layer, "VARIANT_KWARG_KEYS", ())
_ALORA: type | tuple = getattr(variants, "ALoraLinearVariant", ())  # nor has PEFT 0.17
BASES = {nn.Linear, Conv1D}
# The same product, spelt out; by name, so that its family is not imported for it.
_SPELT_OUT = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})
DROPOUTS = frozenset({nn.Dropout, nn.Identity})
_PLAIN = frozenset({nn.Parameter, Tensor})
_FIRST = range(1)


def is_base(layer: nn.Module) -> bool:
    """Whether a layer is, by its class, one that the fused product can stand for."""
    kind = type(layer)
    if f"{kind.__module__}.{kind.__qualname__}" in _SPELT_OUT:
        BASES.add(kind)
    return kind in BASES


def is_plain(tensor: Tensor | None) -> bool:
    """A tensor without a subclass of its own, such as a quantised or a sharded one."""
    return type(tensor) in _PLAIN


def is_bare(module: nn.Module) -> bool:
    """Whether calling ``module`` does nothing but its class's forward."""
    d = module.__dict__
    return not (
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or "forward" in d
    )

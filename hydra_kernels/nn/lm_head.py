"""The output head of a causal language model, as :func:`hydra_kernels.linear_logprob` needs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hydra_kernels.ops.linear_logprob import LinearLogprob, linear_logprob

# Where transformers' configurations keep what happens to the logits behind the head.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
_MULTIPLIES_BY_ITS_DIVISOR = ("hyperclovax",)
_NEEDS = "needs a causal language model"


class LMHead(nn.Module):
    """``logits = cap(multiplier / divisor * (hidden W^T + bias))``, with or without the logits.

    ``cap(x) = softcap tanh(x / softcap)``. The parameters are the model's own: training one trains
    the other, and a head tied to the embedding stays tied. Make a new one after anything that
    replaces the model's parameters, such as ``resize_token_embeddings``.

    Args:
        weight: (V, D).
        bias: (V,) or None.
        softcap: As Gemma 2's ``final_logit_softcapping``.
        multiplier: As Cohere's ``logit_scale``.
        divisor: As Granite's ``logits_scaling``. Kept apart from the multiplier, so that
            :meth:`logits` rounds as the model does.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        softcap: float | None = None,
        multiplier: float = 1.0,
        divisor: float = 1.0,
    ):
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.softcap = softcap
        self.multiplier = multiplier
        self.divisor = divisor

    @property
    def scale(self) -> float:
        """What ``hidden W^T + bias`` is multiplied by, before the soft cap."""
        return self.multiplier / self.divisor

    @classmethod
    def from_model(cls, model: nn.Module, *, verify: bool = True) -> LMHead:
        """The head of a transformers causal language model, adapters and wrappers seen through.

        Args:
            model: What ``AutoModelForCausalLM`` loads, or a ``PeftModel``, a compiled or a
                distributed wrapper around it.
            verify: Run the model on one token and compare its logits with this head's, because an
                architecture may do something to its logits that no table knows of. Left out where
                the parameters are on the meta device.

        Raises:
            ValueError: the model has no linear output head, a LoRA adapter or another copy of the
                head is in the way, or its logits are not those of the head.
        """
        model = _unwrap(model)
        name = type(model).__name__
        find = getattr(model, "get_output_embeddings", None)
        head = find() if find is not None else None
        if head is None:
            raise ValueError(f"LMHead: {name} has no output embeddings; {_NEEDS}")
        head = _without_adapters(head, name)
        weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"LMHead: the head of {name} is a {type(head).__name__} without a (V, D) "
                f"floating-point weight (quantised?)"
            )
        head = cls(weight, bias, **_behind_the_head(model.config))
        if verify and weight.device.type != "meta":
            head._verify(model)
        return head

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) from hidden (..., D), to the bit as the model computes them."""
        logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def logprob(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        ref_hidden: Tensor | None = None,
        ignore_index: int = -100,
        backend: str | None = None,
    ) -> LinearLogprob:
        """Log-probabilities of targets, entropy and KL: :func:`hydra_kernels.linear_logprob`.

        Args:
            hidden: (..., D) what the model feeds its head.
            targets: (...) the token that each of these positions predicts, or ignore_index.
            temperature: Divides the logits behind the soft cap.
            ref_hidden: (..., D) the same under the reference policy.
            ignore_index: Positions with this target count for nothing.
            backend: See :func:`hydra_kernels.linear_logprob`.
        """
        dtype = self.weight.dtype
        # cap(s x) = s c' tanh(x / c') with c' = softcap / s, and the s joins the temperature.
        return linear_logprob(
            hidden.to(dtype),
            self.weight,
            targets,
            bias=self.bias,
            temperature=temperature / self.scale,
            softcap=None if self.softcap is None else self.softcap / self.scale,
            ref_hidden=None if ref_hidden is None else ref_hidden.to(dtype),
            ignore_index=ignore_index,
            backend=backend,
        )

    def extra_repr(self) -> str:
        V, D = self.weight.shape
        rest = "" if self.softcap is None else f", softcap={self.softcap}"
        return f"D={D}, V={V}, bias={self.bias is not None}, scale={self.scale}{rest}"

    @torch.no_grad()
    def _verify(self, model: nn.Module) -> None:
        """Raises ValueError where the model's logits for one token are not this head's."""
        seen: list[Tensor] = []

        def replace(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            # Not the trunk's own output, which is 0 where the token is the padding one.
            hidden = torch.arange(1.0, inputs[0].shape[-1] + 1, device=inputs[0].device).cos()
            largest = nn.functional.linear(hidden.to(self.weight.dtype), self.weight).abs().max()
            # Logits of 50, where every soft cap in use shows.
            hidden = hidden * (50.0 / largest.float().clamp(min=1e-6))
            seen.append(hidden.to(inputs[0].dtype).expand_as(inputs[0]))
            return seen[-1]

        hook = model.get_output_embeddings().register_forward_pre_hook(replace)
        training = [m for m in model.modules() if m.training]
        try:
            model.eval()  # dropout would draw random numbers, and the caller's must not move
            token = torch.zeros(1, 1, dtype=torch.long, device=self.weight.device)
            logits = model(input_ids=token, use_cache=False).logits
        finally:
            hook.remove()
            for module in training:
                module.training = True
        name = type(model).__name__
        if len(seen) != 1:
            raise ValueError(f"LMHead: {name} uses its head {len(seen)} times; {_NEEDS}")
        mine = self.logits(seen[0]).to(logits.dtype)
        # An unknown scale or cap of the logits is far outside of this; a cast to float32 is not.
        if mine.shape != logits.shape or not torch.allclose(mine, logits, rtol=2e-2, atol=1e-3):
            raise ValueError(
                f"LMHead: {name} does something to its logits that its configuration does not say "
                f"in a known place (softcap {self.softcap}, scale {self.scale} found); build "
                f"LMHead(weight, bias, softcap=..., multiplier=...) by hand"
            )


def _unwrap(model: Any) -> nn.Module:
    """The transformers model below torch.compile, DistributedDataParallel and PeftModel."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif not hasattr(model, "get_output_embeddings") and isinstance(
            getattr(model, "module", None), nn.Module
        ):
            model = model.module
        else:
            return model


def _without_adapters(head: Any, name: str) -> nn.Module:
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        raise ValueError(
            f"LMHead: the head of {name} is in modules_to_save, so that each adapter has a copy of "
            f"its own; leave it out, or merge with merge_and_unload()"
        )
    if hasattr(head, "base_layer"):
        if not getattr(head, "merged", False):
            raise ValueError(
                f"LMHead: the head of {name} carries a LoRA adapter, which is not part of its "
                f"weight; merge it (merge_adapter() or merge_and_unload()), or leave the head out "
                f"of target_modules"
            )
        return head.get_base_layer()
    return head


def _behind_the_head(config: Any) -> dict[str, Any]:
    """Softcap, multiplier and divisor of the logits, as the configuration has them."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def first(names: tuple[str, ...]) -> float | None:
        found = (getattr(text, name, None) for name in names)
        return next((float(value) for value in found if value is not None), None)

    multiplier, divisor = first(_MULTIPLIERS) or 1.0, first(_DIVISORS) or 1.0
    if getattr(text, "model_type", "") in _MULTIPLIES_BY_ITS_DIVISOR:
        multiplier, divisor = multiplier * divisor, 1.0
    return {"softcap": first(_SOFTCAPS), "multiplier": multiplier, "divisor": divisor}

"""Which models the engine decodes: those whose past is the keys and values of their masks."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from hydra_rlhf import trunk as trunks


class Unsupported(Exception):
    """The engine cannot run this model; the message says why."""


def check_supported(causal_lm: Any, tokens: int) -> None:
    """Raises Unsupported where what a token sees depends on more than the masks that are given.

    Args:
        causal_lm: transformers' model.
        tokens: Of the longest prompt and response together.
    """
    trunk = trunks.trunk_of(causal_lm)
    if getattr(causal_lm, "_is_stateful", False):
        raise Unsupported(f"{type(trunk).__name__} keeps more of the past than keys and values")
    if "past_key_values" not in inspect.signature(trunk.forward).parameters:
        raise Unsupported(f"{type(trunk).__name__} keeps no keys and values")
    # Transformers 4 says so of every model, and their encoders' blocks say it for themselves.
    if getattr(causal_lm.config, "is_decoder", None) is False and any(
        getattr(module, "is_decoder", None) is False for module in trunk.modules()
    ):
        raise Unsupported(f"{type(trunk).__name__} is an encoder, which sees what comes later")
    check_config(causal_lm.config.get_text_config(), tokens)


def waits_for_experts(causal_lm: Any, capability: tuple[int, int]) -> str:
    """Why a GPU of this compute capability captures no step of the model; empty where it does.

    A product of as many rows as each expert has is sized on the device by the kernels of Hopper and
    of Blackwell's first, in bfloat16; for all others torch asks how many.
    """
    experts = [p for name, p in causal_lm.named_parameters() if ".experts." in name]
    kind = getattr(causal_lm.config.get_text_config(), "_experts_implementation", None)
    if not experts or kind == "batched_mm":
        return ""
    dtype = experts[0].dtype
    if kind == "grouped_mm" and dtype == torch.bfloat16 and capability[0] in (9, 10):
        return ""
    where = "sm_{}{}".format(*capability)
    return f"the host sizes the products of experts ({kind} in {dtype} on {where})"


def check_config(config: Any, tokens: int) -> None:
    """The part of :func:`check_supported` that the decoder's configuration tells."""
    kind = config.model_type
    known = ("full_attention", "sliding_attention")
    others = [layer for layer in getattr(config, "layer_types", None) or () if layer not in known]
    if others:
        raise Unsupported(f"{kind} has layers of {others[0]}")
    if kind == "bloom" or getattr(config, "alibi", False):
        raise Unsupported(f"{kind} makes its biases of attention (ALiBi) from a mask of its own")
    if "local" in (getattr(config, "attention_layers", None) or ()):
        raise Unsupported(f"{kind} has local attention, whose windows are counted from slot 0")
    limit = _rotary_limit(config)
    if limit is not None and tokens > limit:
        raise Unsupported(
            f"{kind} turns keys by another angle once a sequence is past {limit} tokens, "
            f"and these may have {tokens}"
        )


def _rotary_limit(config: Any) -> int | None:
    """Past how many tokens rotary frequencies depend on the longest sequence of a pass."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = []
    # Of the whole model, or of each kind of layer.
    for rotary in (given, *(value for value in given.values() if isinstance(value, dict))):
        kind = str(rotary.get("rope_type", rotary.get("type", "default")))
        if "dynamic" in kind or kind == "longrope":
            limits.append(
                rotary.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or config.max_position_embeddings
            )
    return min(limits, default=None)

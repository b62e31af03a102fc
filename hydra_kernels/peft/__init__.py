"""PEFT models on :func:`hydra_kernels.lora_linear`.

A :class:`FusedLinear` is PEFT's ``lora.Linear`` with another forward: parameters, names in the
state dict, merging, initialisation and everything else stay PEFT's, and so does the forward itself
wherever the fast path does not cover what a layer is asked to do. Three ways in: :func:`fuse` for a
model that exists, :func:`register` for a config, :func:`fused_layers` around code that calls
``get_peft_model`` itself.

:func:`adapter_ids` names the adapter of every sequence or row, in training too, without touching
``requires_grad`` or any layer: a switch makes some thirty calls, and one more for each block.
"""

from hydra_kernels.peft.ids import adapter_ids, adapter_names, checkpoint, keep_adapter_ids
from hydra_kernels.peft.layer import FusedLinear
from hydra_kernels.peft.swap import Report, fuse, fused_layers, register, unfuse

__all__ = [
    "FusedLinear",
    "Report",
    "adapter_ids",
    "adapter_names",
    "checkpoint",
    "fuse",
    "fused_layers",
    "keep_adapter_ids",
    "register",
    "unfuse",
]

"""PEFT's ``modules_to_save`` under adapter ids: each row runs its own adapter's copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from hydra_kernels.peft.current import Current


class GatedModulesToSave(ModulesToSaveWrapper):
    """PEFT's wrapper, which knows the adapter ids of the running thread; all else stays PEFT's."""

    _current = Current()  # shadowed on the instance

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        current = self._current.now
        if current.ids is None or self._disable_adapters:
            return super().forward(*args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names and hydra_kernels.peft.adapter_ids exclude each other")
        if not torch.compiler.is_compiling() and current.only is not None:
            copies = [self.modules_to_save[n] for n in current.only if n in self.modules_to_save]
            return (copies or [self.original_module])[0](*args, **kwargs)
        return self._by_rows(current.ids, current.index, *args, **kwargs)

    def _by_rows(self, ids: Tensor, index: Mapping[str, int], *args: Any, **kwargs: Any) -> Tensor:
        result = self.original_module(*args, **kwargs)
        if not isinstance(result, Tensor) or result.shape[: ids.dim()] != ids.shape:
            what = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"adapter_ids: {tuple(ids.shape)} is no leading part of what a module of "
                f"modules_to_save gives: {what}"
            )
        on_rows = ids.to(result.device).view(ids.shape + (1,) * (result.dim() - ids.dim()))
        for name, i in index.items():
            if name in self.modules_to_save:
                own = self.modules_to_save[name](*args, **kwargs)
                result = torch.where(on_rows == i, own, result)
        return result

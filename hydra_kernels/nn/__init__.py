"""Modules over the ops."""

from hydra_kernels.nn.lm_head import LMHead

__all__ = ["LMHead"]

"""Which of PyTorch's kernels attention runs by: not cuDNN's.

From torch 2.9 on scaled_dot_product_attention tries cuDNN's first on Hopper and Blackwell. Under a
mask, which every padded batch has, that gives gradients of NaN where a length is 64 past a multiple
of 128 and a row's scores are far below 0, as where all are masked: rows of left padding (H100 and
H200, pytorch/pytorch#196678); and it has been seen to sample other tokens without a word (B200,
pytorch/pytorch#193893). PyTorch's other kernels do neither.
"""

from __future__ import annotations

import functools
import logging

import torch

_log = logging.getLogger("hydra_rlhf")


@functools.cache
def without_cudnn() -> None:
    """Leaves it out in this process, once: whoever switches it on again after that has it."""
    if torch.backends.cuda.cudnn_sdp_enabled():
        torch.backends.cuda.enable_cudnn_sdp(False)
        _log.info(
            "cuDNN's attention is off in this process: it gives NaN under masks "
            "(torch.backends.cuda.enable_cudnn_sdp(True) after the model is built keeps it)"
        )

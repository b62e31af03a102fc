"""What :func:`hydra_kernels.linear_logprob` holds besides its arguments, without running it.

For planning memory. On a CPU it is what ``backends/cpu/linear_logprob.py`` allocates where some
rows are ignored. On a GPU it is the larger of the two that may run there, CUDA's and Triton's, each
with its budget of 256 MiB (HYDRA_LOGPROB_BUDGET_MB).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from hydra_kernels.backends.cpu import linear_logprob as cpu
from hydra_kernels.backends.cuda import linear_logprob as cuda

# As the Triton kernels have them, which cannot be imported everywhere.
TRITON_BUDGET_MB, TRITON_UNIT, TRITON_SPLITS, NUM_SUMS = 256, 256, 192, 8


class LogprobMemory(NamedTuple):
    """Bytes. ``kept`` are held from forward to backward; the others only while it runs."""

    kept: int
    forward: int
    backward: int


def linear_logprob_memory(
    M: int,
    D: int,
    V: int,
    dtype: torch.dtype,
    *,
    device: str,
    reference: bool = False,
    differentiated: bool = True,
) -> LogprobMemory:
    """Bytes that a call holds beyond its arguments, results and gradients.

    Args:
        M: Rows, all of which count.
        D: Width of hidden.
        V: Rows of the head.
        dtype: Of hidden and head.
        device: "cpu" or "cuda".
        reference: Whether there is a ref_hidden.
        differentiated: Whether there will be a backward.
    """
    if M == 0:
        return LogprobMemory(0, 0, 0)
    n = 2 if reference else 1
    if device == "cpu":
        return _on_cpu(M, D, V, dtype, n, differentiated)
    forward, backward = (
        max(pair)
        for pair in zip(
            _by_cuda(M, D, V, dtype.itemsize, n),
            _by_triton(M, D, V, dtype.itemsize, n),
            strict=True,
        )
    )
    return LogprobMemory(0, forward, backward)


def _on_cpu(
    M: int, D: int, V: int, dtype: torch.dtype, n: int, differentiated: bool
) -> LogprobMemory:
    hidden, weight = (torch.empty(rows, D, dtype=dtype, device="meta") for rows in (M, V))
    saves = differentiated and cpu.saves_unasked(hidden, weight, hidden if n == 2 else None)
    kept = 4 * n * M * V if saves else 0
    padded, rows, columns = cpu.sizes_of(M, V)
    block = 4 * rows * columns
    # Copies of the rows that count, in the dtype of the products.
    depth = max(D, cpu.LEAST_DEPTH)
    itemsize = dtype.itemsize if cpu.takes(dtype) else 4
    copies = n * itemsize * padded * depth
    head = 0 if itemsize == dtype.itemsize and D == depth else itemsize * columns * depth
    return LogprobMemory(
        kept,
        copies + head + (n * block if not saves or padded != M else 0) + 17 * 4 * M,
        head + (0 if saves else copies) + 4 * padded * depth + (1 if saves else n) * block,
    )


def _by_cuda(M: int, D: int, V: int, itemsize: int, n: int) -> tuple[int, int]:
    rows = -(-M // cuda.ROWS) * cuda.ROWS
    block = cuda.ROWS * cuda.block_columns(V)
    packed = n * rows * D * itemsize
    return (
        packed + 4 * n * block + 4 * 17 * M,
        packed + (4 * n + itemsize) * block + 4 * rows * D,
    )


def _by_triton(M: int, D: int, V: int, itemsize: int, n: int) -> tuple[int, int]:
    budget = float(os.environ.get("HYDRA_LOGPROB_BUDGET_MB") or TRITON_BUDGET_MB) * 2**20
    columns = max(1, int(budget / (M * itemsize)) // TRITON_UNIT) * TRITON_UNIT
    columns = min(columns, -(-V // TRITON_UNIT) * TRITON_UNIT)
    sums = TRITON_SPLITS * NUM_SUMS * n // 2
    return 4 * (sums + 9) * M, M * columns * itemsize + 4 * M * D

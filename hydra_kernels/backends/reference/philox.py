"""Philox4x32-10 in plain PyTorch: which elements a dropout keeps, as every backend draws them.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The key is the
64-bit seed. The counter of the four words that belong to columns ``4 j .. 4 j + 3`` of row ``m`` of
an ``(M, K)`` matrix is ``(group, offset)``, each 64 bits wide and low word first, with
``group = m * ceil(K / 4) + j``. An element is kept where its word, read as an unsigned integer, is
at least ``round(p * 2**32)``.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low word of an unsigned 32-bit product; int64 wraps, which keeps every bit."""
    product = a * b
    return (product >> 32) & _WORD, product & _WORD


def words(group: Tensor, seed: Tensor, offset: Tensor) -> Tensor:
    """The four words (int64, below 2**32) at each counter ``group`` (...); returns (..., 4)."""
    c0, c1 = group & _WORD, (group >> 32) & _WORD
    c2 = (offset & _WORD).expand_as(group)
    c3 = ((offset >> 32) & _WORD).expand_as(group)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def threshold(p: float) -> int:
    """Words below this are dropped."""
    return min(round(p * 2**32), 2**32)


def keep(rows: int, columns: int, p: float, seed: Tensor) -> Tensor:
    """(rows, columns) bool, True where kept. ``seed`` (2,) int64 holds the seed and the offset."""
    groups = -(-columns // 4)
    group = torch.arange(rows * groups, device=seed.device).view(rows, groups)
    drawn = words(group, seed[0], seed[1]).view(rows, 4 * groups)[:, :columns]
    return drawn >= threshold(p)

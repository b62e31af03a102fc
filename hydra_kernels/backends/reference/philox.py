"""Philox4x32-10 in plain PyTorch: which elements a dropout keeps, as every backend draws them.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The key is the
64-bit seed. The counter of columns ``8 j .. 8 j + 7`` of row ``m`` of an ``(M, K)`` matrix is
``(group, offset)``, each 64 bits wide and low word first, with ``group = m * ceil(K / 8) + j``. Its
four words, low halves first, are the eight columns' draws. An element is kept where its draw, an
unsigned 16-bit integer, is at least ``round(p * 2**16)``, so probabilities go in steps of 2**-16.
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
    """Draws below this are dropped."""
    return round(p * 2**16)


def keep(rows: int, columns: int, p: float, seed: Tensor) -> Tensor:
    """(rows, columns) bool, True where kept. ``seed`` (2,) int64 holds the seed and the offset."""
    groups = -(-columns // 8)
    group = torch.arange(rows * groups, device=seed.device).view(rows, groups)
    drawn = words(group, seed[0], seed[1])
    halves = torch.stack((drawn & 0xFFFF, drawn >> 16), dim=-1)
    return halves.view(rows, 8 * groups)[:, :columns] >= threshold(p)

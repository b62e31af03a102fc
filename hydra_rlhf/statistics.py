"""Means, win rates and their intervals, by the bootstrap over prompts.

Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3 (percentile interval).
Policies answer the same prompts, so a prompt is what is drawn: a comparison is paired.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
_CHUNK = 1_000  # resamples held at once


class Estimate(NamedTuple):
    """A mean and the interval that holds it with 95% confidence."""

    mean: float
    low: float
    high: float


def mean_interval(
    values: Sequence[float], *, level: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """The mean of ``values`` with a bootstrap percentile interval.

    Args:
        values: (n,), one a prompt; n above 0.
        level: Confidence, in (0, 1).

    Raises:
        ValueError: no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("mean_interval: expected at least one value, got none")
    rng = np.random.default_rng(seed)
    means = [
        array[rng.integers(0, array.size, (min(_CHUNK, resamples - done), array.size))].mean(1)
        for done in range(0, resamples, _CHUNK)
    ]
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return Estimate(float(array.mean()), float(low), float(high))


def crossed_interval(
    values: Sequence[Sequence[float]],
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """The mean over runs and prompts with an interval that holds for other runs and prompts.

    Every run answers the same prompts, so both are drawn anew, each with replacement, and a
    resample is the mean of the grid of the drawn rows and columns: Owen 2007, "The pigeonhole
    bootstrap", doi:10.1214/07-AOAS122. Bootstrapping the pooled values would count the answers of
    one run as if they were as many runs.

    Args:
        values: (runs, prompts), both above 0.

    Raises:
        ValueError: no values, or runs of different lengths.
    """
    if not values or not len(values[0]) or len({len(row) for row in values}) != 1:
        lengths = [len(row) for row in values]
        raise ValueError(f"crossed_interval: expected runs of one length above 0, got {lengths}")
    array = np.asarray(values, dtype=np.float64)
    runs, prompts = array.shape
    # How often each row and column is drawn, rather than the drawn grids themselves.
    rows, columns = _counts(runs, resamples, seed, 0), _counts(prompts, resamples, seed, 1)
    means = np.einsum("rp,rp->r", rows @ array, columns) / array.size
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Estimate(float(array.mean()), float(low), float(high))


@functools.lru_cache(maxsize=4)  # a table's intervals are all of one shape
def _counts(n: int, resamples: int, seed: int, axis: int) -> np.ndarray:
    """(resamples, n): how often each of n is drawn when n are drawn with replacement."""
    rng = np.random.default_rng((seed, axis))
    return rng.multinomial(n, np.full(n, 1.0 / n), resamples).astype(np.float32)


def wins(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """1 where ours is the greater, 0 where theirs is, half where they tie."""
    return [1.0 if a > b else 0.0 if a < b else 0.5 for a, b in zip(ours, theirs, strict=True)]


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of the n-grams of words in ``texts``, taken together, that are different ones.

    Li et al. 2016, arXiv:1510.03055, section 5. 0 where there is no n-gram.
    """
    grams = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0

"""Whether one run is better than another beyond chance: a paired randomisation test.

If the two runs were equally good, a coin could have chosen the sign of each query's difference.
The p value is the share of random signs under which the mean difference is at least as far from 0
as the one found.
"""

from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
"""Random assignments of signs; the smallest p value is 1 / (DRAWS + 1)."""

_TIE = 1e-12
"""Differences up to here are rounding."""

_BLOCK_VALUES = 4 * 2**20
"""Signs held at a time."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of two runs over the same queries."""

    difference: float
    """Mean of the run minus mean of the other: above 0 the run is better."""
    p_value: float
    """Two-sided."""
    wins: int
    """Queries for which the run is better."""
    ties: int
    losses: int


def compare(values: np.ndarray, other: np.ndarray, *, seed: int) -> Comparison:
    """Compare one metric of two runs query by query.

    Args:
        values: Of the run, of shape (num_queries,).
        other: Of the run it is compared to, same queries in the same order.
        seed: Of the random signs; equal seeds give equal p values.
    """
    differences = values - other
    differences[np.abs(differences) <= _TIE] = 0.0
    return Comparison(
        difference=float(differences.mean()),
        p_value=_p_value(differences[differences != 0], seed),
        wins=int((differences > 0).sum()),
        ties=int((differences == 0).sum()),
        losses=int((differences < 0).sum()),
    )


def _p_value(differences: np.ndarray, seed: int) -> float:
    """Return the p value of differences without zeros, which no sign changes."""
    if not len(differences):
        return 1.0
    random = np.random.default_rng(seed)
    at_least = abs(differences.sum()) - _TIE * np.abs(differences).sum()
    block = max(1, _BLOCK_VALUES // len(differences))
    num_extreme = 0
    for start in range(0, DRAWS, block):
        is_negative = _random_bits(random, min(block, DRAWS - start), len(differences))
        sums = differences.sum() - 2 * (is_negative @ differences)
        num_extreme += int((np.abs(sums) >= at_least).sum())
    return (num_extreme + 1) / (DRAWS + 1)


def _random_bits(random: np.random.Generator, num_rows: int, num_columns: int) -> np.ndarray:
    """Return rows of 0 and 1; each row takes whole words, so that blocks of any size agree."""
    shape = (num_rows, -(-num_columns // 64))
    words = random.integers(0, 2**64, shape, dtype=np.uint64)
    return np.unpackbits(words.view(np.uint8), axis=1, count=num_columns)

"""Which documents that were found for a query may stand as hard negatives of its pair."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from qbatch.errors import ConfigError

Sampling = Literal["random", "top"]

_PRIME = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True, slots=True)
class NegativeRules:
    """The rules of mining, after NV-Retriever (Moreira et al., arXiv 2407.15831).

    A document at rank r with score s is eligible for a pair whose positive has score p if

        first_rank <= r <= last_rank   and   s < max_ratio * p   and   s < p - margin

    max_ratio is the paper's TopK-PercPos (0.95 was its best), margin its TopK-MarginPos (0.05). A
    pair stays if its positive is among the best max_positive_rank: the round-trip consistency of
    Promptagator (Dai et al., arXiv 2209.11755), which drops queries that could mean anything.
    """

    first_rank: int
    last_rank: int
    max_ratio: float | None
    """None: not asked for; likewise the next two."""
    margin: float | None
    max_positive_rank: int | None
    num_negatives: int
    sampling: Sampling
    """Eligible documents in random order, or by rank."""
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.first_rank <= self.last_rank:
            raise ConfigError(
                f"first_rank is {self.first_rank}, last_rank {self.last_rank}; ranks count from 1, "
                "and the last is not before the first"
            )
        if self.num_negatives < 1:
            raise ConfigError(f"num_negatives is {self.num_negatives}; give 1 or more")
        if self.max_ratio is not None and not 0 < self.max_ratio <= 1:
            raise ConfigError(f"max_ratio is {self.max_ratio}; give above 0, at most 1")
        if self.margin is not None and self.margin < 0:
            raise ConfigError(f"margin is {self.margin}; give 0 or more")
        if self.max_positive_rank is not None and not 1 <= self.max_positive_rank <= self.last_rank:
            raise ConfigError(
                f"max_positive_rank is {self.max_positive_rank}; give 1 to last_rank, here "
                f"{self.last_rank}: what stands lower is not looked at"
            )
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; give 0 or more")

    def in_window(self, ranks: np.ndarray) -> np.ndarray:
        """Return which ranks are looked at."""
        inside: np.ndarray = (ranks >= self.first_rank) & (ranks <= self.last_rank)
        return inside

    def below_positive(self, scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
        """Return which documents score clearly less than the positives of their pairs."""
        below = np.ones(len(scores), bool)
        if self.max_ratio is not None:
            below &= scores < self.max_ratio * positive
        if self.margin is not None:
            below &= scores < positive - self.margin
        return below

    def finds_positive(self, positive_ranks: np.ndarray) -> np.ndarray:
        """Return which pairs stay, by the ranks of their positives."""
        if self.max_positive_rank is None:
            return np.ones(len(positive_ranks), bool)
        found: np.ndarray = positive_ranks <= self.max_positive_rank
        return found

    def look_order(self, ranks: np.ndarray, pair: int) -> np.ndarray:
        """Return in which order the eligible documents of a pair are taken.

        Args:
            ranks: Of the documents, in any order.
            pair: What names the pair: the same pair gets the same order.
        """
        by_rank = np.argsort(ranks, kind="stable")
        if self.sampling == "top":
            return by_rank
        rng = np.random.default_rng([self.seed, pair])
        return by_rank[rng.permutation(len(ranks))]


class Positives:
    """Which documents answer which queries, by 64-bit keys, over all pairs of a table."""

    def __init__(self, queries: np.ndarray, documents: np.ndarray) -> None:
        """Take the keys of pairs, uint64, one of each a pair; documents by text or by id."""
        self._keys = np.unique(_combined(queries, documents))

    def fingerprint(self) -> list[int]:
        """Return what tells one set from another: sum and number of its keys."""
        return [int(self._keys.sum(dtype=np.uint64)), len(self._keys)]

    def contain(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Return for each query and document whether a pair holds both: bool."""
        keys = _combined(queries, documents)
        if not len(self._keys):
            return np.zeros(len(keys), bool)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        found: np.ndarray = self._keys[places] == keys
        return found


def _combined(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    combined: np.ndarray = (queries.astype(np.uint64) * _PRIME) ^ documents.astype(np.uint64)
    return combined

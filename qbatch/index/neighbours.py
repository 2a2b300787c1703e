"""Lists of neighbours: sorted, padded, and merged the same way wherever they come from.

A list row holds rows of the index with falling scores; equal scores are in rising row order, so
that every merge is deterministic. Free places hold row -1 and score -inf.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from qbatch.index.columns import Metric, scores_of
from qbatch.index.factory import FAISS_METRICS, search_parameters

_QUERIES_IN_PARALLEL = 3
"""IndexIVF's ``parallel_mode``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """For each query, its best rows."""

    rows: np.ndarray
    """int64, (queries, depth)."""
    scores: np.ndarray
    """float32, same shape."""

    @classmethod
    def of(cls, distances: np.ndarray, rows: np.ndarray, metric: Metric) -> "Neighbours":
        """Take in what FAISS returned."""
        scores = np.where(rows < 0, -np.inf, scores_of(distances, metric))
        return cls(rows=rows, scores=scores.astype(np.float32)).ordered(rows.shape[1])

    def ordered(self, depth: int) -> "Neighbours":
        """Return the best ``depth`` of each list in the one order."""
        # FAISS's lists are in order but for a few ties: looking costs a tenth of sorting.
        wrong = np.flatnonzero(self._is_unordered())
        if not len(wrong):
            return Neighbours(rows=self.rows[:, :depth], scores=self.scores[:, :depth])
        rows, scores = self.rows[wrong], self.scores[wrong]
        order = np.lexsort((_tie_keys(rows), -scores), axis=1)[:, :depth]
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        if len(wrong) == len(self.rows):
            return Neighbours(rows=rows, scores=scores)
        all_rows, all_scores = self.rows[:, :depth].copy(), self.scores[:, :depth].copy()
        all_rows[wrong], all_scores[wrong] = rows, scores
        return Neighbours(rows=all_rows, scores=all_scores)

    def _is_unordered(self) -> np.ndarray:
        """Return which lists are not in the one order: bool, (queries,)."""
        keys, scores = _tie_keys(self.rows), self.scores
        rises = scores[:, 1:] > scores[:, :-1]
        ties = (scores[:, 1:] == scores[:, :-1]) & (keys[:, 1:] < keys[:, :-1])
        unordered: np.ndarray = (rises | ties).any(axis=1)
        return unordered

    def shifted(self, first_row: int) -> "Neighbours":
        """Return the same lists with rows counted from elsewhere."""
        rows = np.where(self.rows < 0, -1, self.rows + first_row)
        return Neighbours(rows=rows, scores=self.scores)

    def without(self, mask: np.ndarray) -> "Neighbours":
        """Return the lists with the marked places freed; ``mask`` is (queries, depth)."""
        return Neighbours(
            rows=np.where(mask, -1, self.rows),
            scores=np.where(mask, np.float32(-np.inf), self.scores),
        ).ordered(self.rows.shape[1])


def _tie_keys(rows: np.ndarray) -> np.ndarray:
    """Return what orders equal scores: rows, free places last."""
    return rows.view(np.uint64)  # -1 becomes the largest


def merge_neighbours(lists: Sequence[Neighbours], depth: int) -> Neighbours:
    """Return the best ``depth`` of several lists over different rows of the same queries."""
    return Neighbours(
        rows=np.concatenate([found.rows for found in lists], axis=1),
        scores=np.concatenate([found.scores for found in lists], axis=1),
    ).ordered(depth)


def exact_neighbours(
    queries: np.ndarray, vectors: np.ndarray, depth: int, metric: Metric
) -> Neighbours:
    """Return the true best rows of a matrix: float32 (queries, dim) against (rows, dim)."""
    distances, rows = faiss.knn(queries, vectors, depth, FAISS_METRICS[metric])
    return Neighbours.of(distances, rows, metric)


def search_index(
    index: faiss.Index,
    queries: np.ndarray,
    depth: int,
    *,
    effort: int,
    metric: Metric,
    selector: faiss.IDSelector | None = None,
) -> Neighbours:
    """Return what an index finds with a given effort, see ``factory.effort_of``."""
    parameters = search_parameters(index, effort, selector)
    distances, rows = index.search(queries, depth, params=parameters)
    return Neighbours.of(distances, rows, metric)


def search_lists(
    index: Any,  # noqa: ANN401 - the stubs know these only of IndexIVF
    queries: np.ndarray,
    depth: int,
    lists: np.ndarray,
    near: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Search given lists; FAISS's wrapper takes their number from the index, not from a call.

    FAISS's default mode shares queries among threads only where it assigns lists itself.
    """
    before = index.nprobe, index.parallel_mode
    index.nprobe, index.parallel_mode = lists.shape[1], _QUERIES_IN_PARALLEL
    distances, rows = index.search_preassigned(queries, depth, lists, near)
    index.nprobe, index.parallel_mode = before
    return distances, rows


class ExactNeighbours:
    """True neighbours of some queries, gathered while vectors stream by."""

    def __init__(self, queries: np.ndarray, depth: int, metric: Metric) -> None:
        self._queries = queries
        self._depth = depth
        self._metric = metric
        self._num_rows = 0
        shape = (len(queries), depth)
        self.found = Neighbours(
            rows=np.full(shape, -1, np.int64), scores=np.full(shape, -np.inf, np.float32)
        )

    def add(self, vectors: np.ndarray) -> None:
        """Take in the next vectors, float32 (rows, dim)."""
        if len(self._queries) and len(vectors):
            new = exact_neighbours(self._queries, vectors, self._depth, self._metric)
            self.found = merge_neighbours([self.found, new.shifted(self._num_rows)], self._depth)
        self._num_rows += len(vectors)

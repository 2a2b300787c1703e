"""Lists of neighbours: sorted, padded, and merged the same way wherever they come from.

A list row holds rows of the index with falling scores; equal scores are in rising row order, so
that every merge is deterministic. Free places hold row -1 and score -inf.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from qbatch.index.columns import Metric, scores_of
from qbatch.index.factory import search_parameters

_FAISS_METRICS = {"l2": faiss.METRIC_L2, "inner_product": faiss.METRIC_INNER_PRODUCT}


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
        ties = np.where(self.rows < 0, np.iinfo(np.int64).max, self.rows)
        order = np.lexsort((ties, -self.scores), axis=1)[:, :depth]
        return Neighbours(
            rows=np.take_along_axis(self.rows, order, 1),
            scores=np.take_along_axis(self.scores, order, 1),
        )

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
    distances, rows = faiss.knn(queries, vectors, depth, _FAISS_METRICS[metric])
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

"""Exact scores for candidates, from the vectors an index was built from."""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

_GATHER_BYTES = 64 * 2**20
"""Vectors copied together at a time."""


class StoredVectors:
    """The vectors of a shard in a local file that is mapped, not held, in memory."""

    def __init__(self, matrices: Iterable[np.ndarray], *, rows: int, dim: int) -> None:
        """Write the matrices, float32 (any, dim), one after the other."""
        self._directory = TemporaryDirectory(prefix="qbatch-vectors-")  # lives as we do
        file = Path(self._directory.name, "vectors.f32")
        with file.open("wb") as stream:
            for matrix in matrices:
                stream.write(np.ascontiguousarray(matrix, np.float32).data)
        self._vectors = np.memmap(file, np.float32, "r", shape=(rows, dim))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of rows: float32, of the rows' shape and (dim,)."""
        return np.asarray(self._vectors[rows])

    def __call__(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return inner products: float32, like ``rows``.

        Args:
            queries: float32, (queries, dim).
            rows: int64, (queries, depth), rows of the shard; -1 gives a score to be ignored.
        """
        scores = np.empty(rows.shape, np.float32)
        step = max(1, _GATHER_BYTES // max(1, rows.shape[1] * self._vectors.shape[1] * 4))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            candidates = self._vectors[np.maximum(rows[part], 0)]
            scores[part] = np.einsum("nd,nkd->nk", queries[part], candidates)
        return scores

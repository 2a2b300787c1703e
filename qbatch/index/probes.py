"""Probes: vectors that stand for queries while an index is measured, and what a shard has for them.

They are held out of the training sample and kept for the life of a template, so that a shard that
did not change need not be searched again. A probe taken from the corpus does not find itself: rows
of its own document are left out of the truth and of what is found.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from qbatch.index.neighbours import Neighbours
from qbatch.schema import vector_array, vector_matrix

EXACT_DEPTH = 128
"""Neighbours kept of a probe: 100 are measured; the rest pays for ties and own rows."""

EXACT = -1
"""In the ``effort`` column: the true neighbours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probes:
    """Vectors to measure with, and which document each comes from."""

    vectors: np.ndarray
    """float32, (probes, dim)."""
    doc_ids: pa.Array
    """large_string; null for real queries, which are no documents."""

    def to_table(self) -> pa.Table:
        """Return columns ``doc_id`` and ``vector``."""
        return pa.table({"doc_id": self.doc_ids, "vector": vector_array(self.vectors)})

    @classmethod
    def from_table(cls, table: pa.Table) -> "Probes":
        """Return what ``to_table`` made."""
        doc_ids = table["doc_id"].combine_chunks().cast(pa.large_string())
        return cls(vectors=vector_matrix(table["vector"]), doc_ids=doc_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResults:
    """What one shard has for the probes; rows are counted inside the shard."""

    exact: Neighbours
    found: dict[int, Neighbours]
    """By effort, rising; a shard stops when more effort finds nothing new."""
    seconds: dict[int, float]

    def at(self, effort: int) -> Neighbours:
        """Return what was found with an effort, or with the most that was tried."""
        tried = [step for step in self.found if step <= effort]
        return self.found[max(tried, default=min(self.found))]

    def without(self, rows: Sequence[int]) -> "ProbeResults":
        """Return the same results as if some rows of the shard were not there.

        Lists that lose places end earlier: EXACT_DEPTH leaves room for some.
        """
        gone = np.asarray(rows, np.int64)

        def forget(found: Neighbours) -> Neighbours:
            return found.without(np.isin(found.rows, gone))

        return ProbeResults(
            exact=forget(self.exact),
            found={effort: forget(found) for effort, found in self.found.items()},
            seconds=self.seconds,
        )

    def to_table(self) -> pa.Table:
        """Return columns ``effort``, ``seconds``, ``rows``, ``scores``: a row for each list."""
        lists = {EXACT: self.exact, **self.found}
        depth = self.exact.rows.shape[1]
        parts = [
            pa.table(
                {
                    "effort": np.full(len(found.rows), effort, np.int32),
                    "seconds": np.full(len(found.rows), self.seconds.get(effort, 0.0)),
                    "rows": vector_array(found.rows.astype(np.int32)),
                    "scores": vector_array(found.scores),
                }
            )
            for effort, found in lists.items()
        ]
        return pa.concat_tables(parts) if depth else parts[0]

    @classmethod
    def from_table(cls, table: pa.Table) -> "ProbeResults":
        """Return what ``to_table`` made."""
        efforts = table["effort"].to_numpy()
        rows = vector_matrix(table["rows"].combine_chunks()).astype(np.int64)
        scores = vector_matrix(table["scores"].combine_chunks())
        seconds = table["seconds"].to_numpy()
        lists, times = {}, {}
        for effort in dict.fromkeys(efforts.tolist()):
            mask = efforts == effort
            lists[effort] = Neighbours(rows=rows[mask], scores=scores[mask])
            times[effort] = float(seconds[mask][0])
        exact = lists.pop(EXACT)
        del times[EXACT]
        return cls(exact=exact, found=lists, seconds=times)


def mark_own_rows(found: Neighbours, own: np.ndarray) -> np.ndarray:
    """Return which places hold a row of the query's own document: bool, like ``found.rows``.

    Args:
        found: Rows inside a shard.
        own: int64, (pairs, 2): query number and row of the shard.
    """
    mask = np.zeros(found.rows.shape, bool)
    np.logical_or.at(mask, own[:, 0], found.rows[own[:, 0]] == own[:, 1:])
    return mask

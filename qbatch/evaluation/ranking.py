"""The one order of a run's documents: what every metric sees and what an export writes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True, slots=True)
class Ranking:
    """The documents of every query, best first, each once.

    The documents of query ``i`` are ``doc_ids[offsets[i]:offsets[i + 1]]``.
    """

    query_ids: pa.Array
    """Each once, in order of their bytes."""
    offsets: np.ndarray
    """int64 of shape (num_queries + 1,)."""
    doc_ids: pa.Array
    scores: pa.Array | None
    """None for a run that has ranks only."""
    num_repeats: int
    """Rows left out because their document stands higher up in the same query."""
    num_inversions: int
    """Neighbours whose scores rise while their ranks fall; ranks decided."""

    def positions(self) -> np.ndarray:
        """Return the place of every document in its query, from 1."""
        starts = np.repeat(self.offsets[:-1], np.diff(self.offsets))
        positions: np.ndarray = np.arange(1, len(self.doc_ids) + 1) - starts
        return positions

    def iter_batches(self, max_rows: int) -> Iterator[tuple[int, int]]:
        """Yield first and last (exclusive) query of runs of neighbours that hold few rows.

        Args:
            max_rows: Rows of a batch; a query that has more stands alone.
        """
        first = 0
        while first < len(self.query_ids):
            limit = self.offsets[first] + max_rows
            last = int(np.searchsorted(self.offsets, limit, side="right")) - 1
            last = max(last, first + 1)
            yield first, last
            first = last


def rank_documents(run: pa.Table) -> Ranking:
    """Order the rows of a run and keep each document of a query once, at its best place.

    ``rank`` decides when the run has one, so that evaluation sees the order that was published.
    Equal ranks, and runs without ranks, go by falling score; equal scores by falling ``doc_id``
    (bytes), which is how trec_eval orders them.

    Args:
        run: ``query_id``, ``doc_id`` and at least one of ``rank`` and ``score``, no nulls, no NaN.
    """
    queries, query_ids = _codes_in_order(run["query_id"])
    documents = run["doc_id"].combine_chunks().dictionary_encode()
    document_codes = documents.indices.to_numpy()
    has_scores = "score" in run.column_names
    ranks = run["rank"].to_numpy() if "rank" in run.column_names else np.zeros(len(run), np.int32)
    falling = -run["score"].to_numpy() if has_scores else np.zeros(len(run), np.float32)
    order = _order(queries, ranks, falling, run["doc_id"])
    pairs = queries[order].astype(np.int64) * len(documents.dictionary) + document_codes[order]
    kept = np.sort(np.unique(pairs, return_index=True)[1])
    rows = order[kept]
    counts = np.bincount(queries[rows], minlength=len(query_ids))
    rises = falling[rows][1:] < falling[rows][:-1]
    rises &= queries[rows][1:] == queries[rows][:-1]
    return Ranking(
        query_ids=query_ids,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        doc_ids=run["doc_id"].combine_chunks().take(pa.array(rows)),
        scores=run["score"].combine_chunks().take(pa.array(rows)) if has_scores else None,
        num_repeats=len(order) - len(kept),
        num_inversions=int(rises.sum()),
    )


def _codes_in_order(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Return the place of every value among the different values, and those in order."""
    encoded = column.combine_chunks().dictionary_encode()
    order = pc.array_sort_indices(encoded.dictionary)
    places = np.empty(len(order), np.int32)
    places[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
    return places[encoded.indices.to_numpy()], encoded.dictionary.take(order)


def _order(
    queries: np.ndarray, ranks: np.ndarray, falling: np.ndarray, doc_ids: pa.ChunkedArray
) -> np.ndarray:
    order = np.lexsort((falling, ranks, queries))
    keys = (queries[order], ranks[order], falling[order])
    is_tied = np.logical_and.reduce([key[1:] == key[:-1] for key in keys])
    if not is_tied.any():
        return order
    tied = order[np.append(is_tied, False) | np.append(False, is_tied)]
    by_name = np.zeros(len(order), np.int64)
    names = doc_ids.take(pa.array(tied)).combine_chunks()
    by_name[tied] = pc.rank(names, sort_keys="descending", tiebreaker="dense").to_numpy()
    return np.lexsort((by_name, falling, ranks, queries))

"""Searching one shard: the best documents of each query, whatever is filtered out on the way.

A document is found once, with its best passage. Rows that do not count (filtered, deleted, of the
query's own document, further passages) are left out inside FAISS where it can, and else by
fetching more and dropping them; queries left short are searched again, deeper.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qbatch.index.columns import Metric
from qbatch.index.device import MAX_GPU_DEPTH, has_gpu, honours_selectors, is_on_gpu, to_gpu
from qbatch.index.factory import inner_index, search_parameters
from qbatch.index.neighbours import Neighbours, search_lists

_MOST_ROWS = 0.5
"""Where more rows than this may be found, the others are dropped after the search: a selector is
asked for every row that is looked at, and lists can then not be assigned for all shards at once."""

_DEEPER = 4
"""Queries left short are searched for this many times as many rows."""

Rescorer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From queries (n, dim) and rows (n, depth) to exact scores (n, depth)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOptions:
    """How a shard is searched."""

    top_k: int
    effort: int
    """See ``factory.effort_of``."""
    rescore: int = 0
    """Exact scores for this many times ``top_k`` candidates; 0 keeps the index's own scores."""

    @property
    def depth(self) -> int:
        """Documents wanted from the index."""
        return self.top_k * max(1, self.rescore)


class CoarseAssignment:
    """The lists each query visits: the same in all shards of a template, so computed once."""

    def __init__(self, index: faiss.Index, queries: np.ndarray, nprobe: int) -> None:
        """Assign queries, float32 (n, dim), to the lists of an index."""
        quantizer = inner_index(index).quantizer  # type: ignore[attr-defined]  # callers know
        self.distances, self.lists = quantizer.search(queries, nprobe)


def can_share_assignment(index: faiss.Index) -> bool:
    """Tell whether a shard takes an assignment made outside: plain inverted lists on a processor.

    FastScan and RaBitQ search in ways of their own.
    """
    plain = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)
    return type(index) in plain and not is_on_gpu(index)


def can_merge(index: faiss.Index) -> bool:
    """Tell whether shards of this kind may become one index: plain lists, where no GPU searches.

    A list that lies in one piece is looked up once a query, not once a shard.
    """
    return can_share_assignment(index) and not has_gpu()


class ShardSearcher:
    """A loaded shard."""

    def __init__(
        self,
        index: faiss.Index,
        ids: pa.Table,
        metric: Metric,
        *,
        allowed: np.ndarray | None = None,
        rescorer: Rescorer | None = None,
    ) -> None:
        """Take over a shard.

        Args:
            index: On the processor; moved to a GPU where there is one.
            ids: The sidecar; row i belongs to vector i.
            metric: How vectors compare.
            allowed: bool, (rows,): rows that may be found; None is all.
            rescorer: Gives exact scores.
        """
        self._cpu_index = index
        self._index = to_gpu(index)
        self._metric = metric
        self._allowed = allowed
        self._drops_late = allowed is not None and allowed.mean() > _MOST_ROWS
        self._rescorer = rescorer
        self.ids = ids
        encoded = pc.dictionary_encode(ids["doc_id"]).combine_chunks()
        self._documents: pa.Array = encoded.dictionary
        self._document_of = encoded.indices.to_numpy()
        self._has_passages = len(self._documents) < len(ids)

    @property
    def index(self) -> faiss.Index:
        """Where it is searched."""
        return self._index

    def search(
        self,
        queries: np.ndarray,
        options: SearchOptions,
        *,
        own_ids: pa.Array | None = None,
        assignment: CoarseAssignment | None = None,
    ) -> Neighbours:
        """Return the best rows of each query, at most one a document: (queries, depth).

        Args:
            queries: float32, (queries, dim), of unit length where the index's vectors have it.
            options: How deep and how hard.
            own_ids: Documents that must not be found, one for each query.
            assignment: From ``CoarseAssignment``, for these queries; None computes it.
        """
        own = None if own_ids is None else self._codes(own_ids)
        depth = min(options.depth, len(self.ids))
        found = self._fetch_all(queries, depth, options.effort, own, assignment)
        if self._rescorer is not None and options.rescore:
            scores = np.where(found.rows < 0, -np.inf, self._rescorer(queries, found.rows))
            found = Neighbours(rows=found.rows, scores=scores.astype(np.float32))
        return found.ordered(options.top_k)

    def _codes(self, doc_ids: pa.Array) -> np.ndarray:
        """Return the document number of each id, -1 where this shard has none."""
        codes = pc.index_in(doc_ids, self._documents).fill_null(-1)
        numbers: np.ndarray = codes.to_numpy(zero_copy_only=False)
        return numbers

    def _fetch_all(
        self,
        queries: np.ndarray,
        depth: int,
        effort: int,
        own: np.ndarray | None,
        assignment: CoarseAssignment | None,
    ) -> Neighbours:
        shape = (len(queries), depth)
        rows, scores = np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)
        waiting = np.arange(len(queries))
        fetch = self._first_fetch(depth, own is not None)
        while len(waiting):
            found = self._search(queries, waiting, fetch, effort, assignment)
            is_exhausted = (found.rows[:, -1] < 0) | (fetch >= len(self.ids))
            kept = self._keep(found, None if own is None else own[waiting], depth)
            rows[waiting, : kept.rows.shape[1]] = kept.rows
            scores[waiting, : kept.rows.shape[1]] = kept.scores
            is_short = (kept.rows >= 0).sum(axis=1) < depth
            waiting = waiting[is_short & ~is_exhausted]
            fetch = min(fetch * _DEEPER, len(self.ids))
        return Neighbours(rows=rows, scores=scores)

    def _first_fetch(self, depth: int, excludes_own: bool) -> int:
        num_rows, wanted = len(self.ids), depth + excludes_own
        if self._has_passages:
            wanted = int(wanted * num_rows / len(self._documents) * 1.5) + 1
        if self._allowed is not None and not self._selects(self._index):
            wanted = int(wanted * num_rows / max(self._allowed.sum(), 1) * 1.5) + 1
        return max(1, min(wanted, num_rows))

    def _search(
        self,
        queries: np.ndarray,
        waiting: np.ndarray,
        fetch: int,
        effort: int,
        assignment: CoarseAssignment | None,
    ) -> Neighbours:
        """Search some of the queries; what a GPU cannot do is done on the processor."""
        index = self._index
        if is_on_gpu(index) and max(fetch, effort) > MAX_GPU_DEPTH:
            index = self._cpu_index
        selector = None
        if self._allowed is not None and self._selects(index):
            bits = np.packbits(self._allowed, bitorder="little")
            selector = faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg, arg-type]  # stubs are C++
        chosen = queries if len(waiting) == len(queries) else queries[waiting]
        if assignment is not None and selector is None and can_share_assignment(index):
            lists, near = assignment.lists[waiting], assignment.distances[waiting]
            distances, rows = search_lists(index, chosen, fetch, lists, near)
        else:
            parameters = search_parameters(index, effort, selector)
            distances, rows = index.search(chosen, fetch, params=parameters)
        return Neighbours.of(distances, rows, self._metric)

    def _selects(self, index: faiss.Index) -> bool:
        """Tell whether FAISS leaves out what may not be found."""
        return honours_selectors(index) and not self._drops_late

    def _keep(self, found: Neighbours, own: np.ndarray | None, depth: int) -> Neighbours:
        """Return the first ``depth`` rows of each list that count."""
        drop = np.zeros(found.rows.shape, bool)
        if self._allowed is not None:
            drop |= ~self._allowed[found.rows]
        documents = np.where(found.rows < 0, -2, self._document_of[found.rows])
        if own is not None:
            drop |= documents == own[:, None]
        if self._has_passages:
            drop |= _is_repeated(np.where(drop, -2, documents))
        kept = found.without(drop) if drop.any() else found
        return Neighbours(rows=kept.rows[:, :depth], scores=kept.scores[:, :depth])


def _is_repeated(codes: np.ndarray) -> np.ndarray:
    """Return where a non-negative code stands in a line for the second time or later."""
    order = np.argsort(codes, axis=1, kind="stable")
    sorted_codes = np.take_along_axis(codes, order, 1)
    again = np.zeros(codes.shape, bool)
    again[:, 1:] = (sorted_codes[:, 1:] == sorted_codes[:, :-1]) & (sorted_codes[:, 1:] >= 0)
    repeated = np.empty_like(again)
    np.put_along_axis(repeated, order, again, 1)
    return repeated


def hits_table(found: Neighbours, searcher: ShardSearcher, first_row: int) -> pa.Table:
    """Return what a shard found as a table, one row a hit, in query order and best first.

    Args:
        found: Rows inside the shard.
        searcher: Of the shard, which knows the ids.
        first_row: Of the shard, counted over all shards.

    Returns:
        ``query`` (int32, the query's number), ``row`` (int64, over all shards), ``score``,
        ``doc_id``, ``passage_id``.
    """
    is_hit = found.rows >= 0
    queries, _ = np.nonzero(is_hit)
    rows = found.rows[is_hit]
    ids = searcher.ids.select(["doc_id", "passage_id"]).take(pa.array(rows))
    return pa.table(
        {
            "query": queries.astype(np.int32),
            "row": rows + first_row,
            "score": found.scores[is_hit],
            "doc_id": ids["doc_id"].cast(pa.large_string()),
            "passage_id": ids["passage_id"].cast(pa.large_string()),
        }
    )


def merge_hits(tables: Sequence[pa.Table], top_k: int) -> pa.Table:
    """Return the best hits of each query over several shards, and their ranks from 1.

    Equal scores are ordered by row over all shards. A document that several shards hold, which
    happens when ids repeat in a corpus, counts once.
    """
    if len(tables) == 1:
        return _ranked_hits(tables[0], top_k)
    hits = pa.concat_tables(tables).combine_chunks()
    query, row, score = (hits[name].to_numpy() for name in ("query", "row", "score"))
    order = np.lexsort((row, -score, query))
    query = query[order]
    codes = pc.dictionary_encode(hits["doc_id"]).combine_chunks().indices.to_numpy()[order]
    is_first = _is_first_pair(query, codes)
    order, query = order[is_first], query[is_first]
    is_top = _ranks(query) <= top_k
    return _ranked_hits(hits.take(pa.array(order[is_top])), top_k)


def _ranked_hits(hits: pa.Table, top_k: int) -> pa.Table:
    """Add ranks to hits that are in order, without repeated documents, and cut the lists."""
    ranks = _ranks(hits["query"].to_numpy())
    ranked = hits.append_column("rank", pa.array(ranks, pa.int32()))
    return ranked.filter(pa.array(ranks <= top_k)) if (ranks > top_k).any() else ranked


def _ranks(queries: np.ndarray) -> np.ndarray:
    """Return the place of each row, from 1, among those of its query, which are neighbours."""
    starts = np.flatnonzero(np.diff(queries, prepend=-1))
    counts = np.diff(starts, append=len(queries))
    ranks: np.ndarray = np.arange(len(queries)) - np.repeat(starts, counts) + 1
    return ranks


def _is_first_pair(queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return where a (query, document) pair stands for the first time."""
    pairs = queries.astype(np.int64) * (int(codes.max(initial=0)) + 1) + codes
    _, first = np.unique(pairs, return_index=True)
    mask = np.zeros(len(pairs), bool)
    mask[first] = True
    return mask

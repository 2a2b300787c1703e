"""From what a search found to candidates: what must not be shown goes, what is left may vary."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qbatch.index.diversity import diversify
from qbatch.index.items import ItemRows, ItemTable
from qbatch.schema import RUN

_GATHER_BYTES = 64 * 2**20
"""Vectors compared with each other at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionOptions:
    """Which of the documents found become candidates."""

    top_k: int
    """Candidates a query."""
    are_items: bool = False
    """Queries are rows of the index: copies of their texts, and of each other, are left out."""
    max_similarity: float | None = None
    """Scores above it are near-duplicates."""
    same: str | None = None
    """Column in which a candidate has the value of the item."""
    diversity: float = 0.0
    """See ``diversity.diversify``; 0 keeps the order of the search."""


def select_candidates(
    run: pa.Table,
    items: ItemTable | None,
    options: SelectionOptions,
    *,
    asking: ItemRows | None = None,
) -> pa.Table:
    """Return the candidates of every query, ranked anew; scores stay those of the search.

    Args:
        run: schema.LOCATED_RUN, the rows of a query together and in rank order.
        items: All rows of the index; None when ``options`` need none.
        options: What to leave out, and how much to vary.
        asking: With items as queries: the rows of the file of queries.

    Returns:
        schema.RUN. A query that is left without candidates has no rows.
    """
    run = run.combine_chunks()
    query = np.cumsum(run["rank"].to_numpy() == 1) - 1
    kept = np.flatnonzero(_allowed(run, items, options, asking))
    if options.are_items and items is not None:
        place = pc.rank(run["doc_id"], tiebreaker="dense").to_numpy()[kept]
        hashes = items.hashes[run["row"].to_numpy()[kept]]
        kept = kept[_is_first_copy(query[kept], hashes, place)]
    _, starts, sizes = np.unique(query[kept], return_index=True, return_counts=True)
    if options.diversity and items is not None and len(kept):
        places, ranks = _varied(run, kept, starts, sizes, items, options)
    else:
        ranks = np.arange(len(kept)) - np.repeat(starts, sizes) + 1
        places, ranks = kept[ranks <= options.top_k], ranks[ranks <= options.top_k]
    chosen = run.take(pa.array(places)).set_column(
        run.schema.get_field_index("rank"), "rank", pa.array(ranks, pa.int32())
    )
    return pa.table([chosen[name] for name in RUN.names], schema=RUN)


def _allowed(
    run: pa.Table,
    items: ItemTable | None,
    options: SelectionOptions,
    asking: ItemRows | None,
) -> np.ndarray:
    is_kept = np.ones(len(run), bool)
    if options.max_similarity is not None:
        is_kept &= run["score"].to_numpy() <= np.float32(options.max_similarity)
    if items is not None and asking is not None:
        rows, own = run["row"].to_numpy(), run["query_row"].to_numpy()
        is_kept &= (items.hashes[rows] != asking.hashes[own]).any(axis=1)
        if options.same is not None:
            groups = items.groups[rows]
            is_kept &= (groups == asking.groups[own]) & (groups >= 0)
    return is_kept


def _is_first_copy(query: np.ndarray, hashes: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return which candidates have the first id of those of their query with the same text.

    Copies have the same score up to its last bits, which would decide anew every night.
    """
    order = np.lexsort((place, hashes[:, 1], hashes[:, 0], query))
    keys = np.column_stack([query.astype(np.uint64), hashes])[order]
    is_first = np.ones(len(place), bool)
    is_first[order[1:]] = (keys[1:] != keys[:-1]).any(axis=1)
    return is_first


def _varied(
    run: pa.Table,
    kept: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
    items: ItemTable,
    options: SelectionOptions,
) -> tuple[np.ndarray, np.ndarray]:
    """Return places in the run and ranks, chosen by relevance and variety."""
    rows, scores = run["row"].to_numpy(), run["score"].to_numpy()
    columns = np.arange(sizes.max())
    all_places, all_ranks = [], []
    for part in _parts(len(starts), len(columns), items.vectors(rows[:1]).shape[1]):
        is_there = columns < sizes[part, None]
        places = kept[np.where(is_there, starts[part, None] + columns, 0)]
        chosen = diversify(
            np.where(is_there, scores[places], -np.inf).astype(np.float32),
            _cosines(items.vectors(rows[places])),
            top_k=options.top_k,
            diversity=options.diversity,
        )
        is_chosen = chosen >= 0
        all_places.append(np.take_along_axis(places, np.maximum(chosen, 0), 1)[is_chosen])
        all_ranks.append(np.nonzero(is_chosen)[1] + 1)
    return np.concatenate(all_places), np.concatenate(all_ranks)


def _parts(num_queries: int, depth: int, dim: int) -> Iterator[slice]:
    step = max(1, _GATHER_BYTES // (4 * depth * max(dim, depth)))
    for start in range(0, num_queries, step):
        yield slice(start, start + step)


def _cosines(vectors: np.ndarray) -> np.ndarray:
    """Return the cosines between the vectors of each query: (queries, depth, depth)."""
    lengths = np.linalg.norm(vectors, axis=2, keepdims=True)
    unit = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    cosines: np.ndarray = unit @ unit.transpose(0, 2, 1)
    return cosines

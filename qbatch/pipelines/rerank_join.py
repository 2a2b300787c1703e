"""The second half of the join: one part's candidates get their texts and are cut into units.

A unit holds whole queries, so that everything after it - cuts, ranks, fusion - happens in one
place. Its borders follow from the hashes of query ids: a changed query changes its own unit and no
other. A query with more candidates than a unit is meant to have is a unit of its own.
Imports no torch.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qbatch.corpus import reasons
from qbatch.errors import IntegrityError
from qbatch.manifest import fingerprint_id
from qbatch.pipelines.embed_task import unit_row
from qbatch.pipelines.rerank_pairs import PAIRS, pair_rejects
from qbatch.pipelines.rerank_shuffle import stable_hashes
from qbatch.pipelines.segment_files import (
    Segment,
    find_segment,
    list_segments,
    read_segment,
    table_bytes,
    table_of,
    write_segments,
)
from qbatch.schema import REJECTS
from qbatch.storage import Storage

_READ_THREADS = 16

_NO_RANK = np.iinfo(np.int32).max


@dataclass(frozen=True, kw_only=True, slots=True)
class RerankUnit:
    """Some whole queries with their candidates, stored as a segment."""

    content: str
    """Hash of queries, candidates and rejects, wherever they came from."""
    pairs: int
    """Candidates with texts."""
    segment: Segment

    def key(self, fingerprint: str) -> str:
        """Return the name of this unit's output under a fingerprint."""
        return fingerprint_id({"content": self.content, "fingerprint": fingerprint})

    def to_json(self) -> str:
        """Return the unit for a plan."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RerankUnit":
        """Return the unit that ``to_json`` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "segment": Segment(**fields["segment"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinInputs:
    """The files of the shuffle, each with its size; it travels."""

    candidates: tuple[tuple[str, int], ...]
    queries: tuple[tuple[str, int], ...]
    documents: tuple[tuple[str, int], ...]
    num_parts: int
    has_texts: bool


def stored_units(storage: Storage, path: str, size: int) -> list[RerankUnit]:
    """Return the units of a part that was joined before."""
    *segments, last = list_segments(storage, path, size)
    return _located(json.loads(read_segment(storage, last)), segments)


def _located(units: Sequence[Sequence[Any]], segments: Sequence[Segment]) -> list[RerankUnit]:
    return [
        RerankUnit(content=content, pairs=pairs, segment=segment)
        for (content, pairs), segment in zip(units, segments, strict=True)
    ]


def join_part(
    storage: Storage, path: str, part: int, inputs: JoinInputs, unit_pairs: int
) -> list[RerankUnit]:
    """Join one part, write its units as segments of a file, and return them."""
    count = inputs.num_parts + 2
    pairs = _read(storage, inputs.candidates, part, count, PAIRS)
    own_files = inputs.candidates[part :: inputs.num_parts]
    rejects = [_read(storage, own_files, inputs.num_parts, count, REJECTS)]
    num_read = len(pairs) + _num_rows(rejects[0])
    if not inputs.has_texts:
        for name, reason, files in (
            ("query", reasons.MISSING_QUERY, inputs.queries),
            ("text", reasons.MISSING_DOCUMENT, inputs.documents),
        ):
            texts = _read(storage, files, part, inputs.num_parts, None)
            pairs, missing = _join(pairs, texts, name, reason)
            rejects.append(missing)
    units: list[tuple[str, int]] = []
    num_cut = 0

    def segments() -> Iterator[bytes]:
        nonlocal num_cut
        for content, unit in _cut(pairs, rejects, unit_pairs):
            stats = unit_stats(unit)
            num_cut += stats["pairs_in"]
            units.append((content, stats["pairs"]))
            yield table_bytes(unit)
        if num_cut != num_read:
            raise IntegrityError(
                f"{num_read} candidates were read for part {part}, {num_cut} are in its units; "
                "nothing was written. This is a bug: report it with the input"
            )
        yield json.dumps(units).encode()

    return _located(units, write_segments(storage, path, segments())[:-1])


def _read(
    storage: Storage,
    files: Sequence[tuple[str, int]],
    number: int,
    count: int,
    schema: pa.Schema | None,
) -> pa.Table:
    def read(file: tuple[str, int]) -> pa.Table:
        found = find_segment(storage, *file, number=number, count=count)
        return table_of(read_segment(storage, found))

    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="join") as pool:
        tables = list(pool.map(read, files))
    return pa.concat_tables(tables if schema is None else [schema.empty_table(), *tables])


def _join(pairs: pa.Table, texts: pa.Table, name: str, reason: str) -> tuple[pa.Table, pa.Table]:
    """Fill the column ``name`` by id; return the pairs that found a text, and rejects of others.

    Of several texts of one id the first counts.
    """
    ids = texts["id"].combine_chunks()
    codes = ids.dictionary_encode().indices.to_numpy()
    first = pa.array(np.sort(np.unique(codes, return_index=True)[1]))
    column = "query_id" if name == "query" else "doc_id"
    index = pc.index_in(pairs[column], ids.take(first)).combine_chunks()
    found = texts["text"].combine_chunks().take(first).take(index)
    position = pairs.schema.get_field_index(name)
    joined = pairs.set_column(position, PAIRS.field(name), found)
    is_lost = index.is_null()
    where = "--queries" if name == "query" else "--corpus"
    rejects = pair_rejects(pairs.filter(is_lost), reason, f"no such {column} in {where}")
    lost = pairs.filter(is_lost)["query_id"]
    rejects = rejects.append_column("query_id", lost)
    return joined.filter(pc.invert(is_lost)), rejects


def _cut(
    pairs: pa.Table, rejects: Sequence[pa.Table], unit_pairs: int
) -> Iterator[tuple[str, pa.Table]]:
    """Yield units with the hash of their content; every pair and reject is in one of them."""
    pairs, repeats = order_candidates(pairs)
    loose, *named = rejects
    lost = pa.concat_tables(named) if named else None
    ids = (
        pairs["query_id"]
        if lost is None
        else pa.chunked_array(
            [*pairs["query_id"].chunks, *lost["query_id"].chunks], pa.large_string()
        )
    )
    groups = _QueryGroups(ids, len(pairs), unit_pairs)
    for unit in range(groups.num_units):
        rows, extra = groups.members(unit)
        own = loose if unit == 0 else loose.slice(0, 0)
        if lost is not None:
            own = pa.concat_tables([own, lost.take(pa.array(extra)).drop_columns(["query_id"])])
        kept = pairs.take(pa.array(rows))
        stats = _stats(kept, own, int(repeats[rows].sum()), groups.num_queries(unit))
        content = table_bytes(kept.drop_columns(["object_uri", "row"]))
        digest = hashlib.sha256(content + table_bytes(own) + json.dumps(stats).encode())
        yield digest.hexdigest()[:32], unit_row("", stats, pairs=kept, rejects=own)
    if not groups.num_units and len(loose):
        digest = hashlib.sha256(table_bytes(loose))
        row = unit_row("", _stats(pairs, loose, 0, 0), pairs=pairs, rejects=loose)
        yield digest.hexdigest()[:32], row


def _stats(
    pairs: pa.Table, rejects: pa.Table, num_repeats: int, num_queries: int
) -> dict[str, int]:
    return {
        "pairs_in": len(pairs) + num_repeats + _num_rows(rejects),
        "pairs": len(pairs),
        "repeated": num_repeats,
        "queries": num_queries,
    }


def _num_rows(rejects: pa.Table) -> int:
    """Return how many rejects are pairs and not whole objects."""
    return reasons.num_row_rejects(Counter(rejects["reason"].to_pylist()))


class _QueryGroups:
    """Which queries share a unit."""

    def __init__(self, query_ids: pa.ChunkedArray, num_pairs: int, unit_pairs: int) -> None:
        self._num_pairs = num_pairs
        encoded = query_ids.combine_chunks().dictionary_encode()
        codes = encoded.indices.to_numpy()
        hashes = stable_hashes(pa.chunked_array([encoded.dictionary]))
        sizes = np.bincount(codes, minlength=len(hashes))
        order = np.argsort(hashes, kind="stable")
        unit_of = np.empty(len(hashes), np.int64)
        places = np.empty(len(hashes), np.int64)
        places[order] = np.arange(len(order))
        unit_of[order] = _units_of(hashes[order], sizes[order], unit_pairs)
        self._units = unit_of[codes]
        self._order = np.lexsort((np.arange(len(codes)), places[codes], self._units))
        self.num_units = int(unit_of.max()) + 1 if len(unit_of) else 0
        self._queries = np.bincount(unit_of, minlength=self.num_units)
        self._bounds = np.searchsorted(self._units[self._order], np.arange(self.num_units + 1))

    def members(self, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of a unit, query by query: of pairs, and of what was rejected."""
        rows = self._order[self._bounds[unit] : self._bounds[unit + 1]]
        return rows[rows < self._num_pairs], rows[rows >= self._num_pairs] - self._num_pairs

    def num_queries(self, unit: int) -> int:
        return int(self._queries[unit])


def _units_of(hashes: np.ndarray, sizes: np.ndarray, unit_pairs: int) -> np.ndarray:
    """Return the unit of each query; a query above ``unit_pairs`` is alone.

    A border follows a query when its hash falls into as large a part of the hash range as its
    candidates are of half a unit, as between the small objects of a corpus; few units fill up.
    """
    units = np.empty(len(hashes), np.int64)
    unit = filled = 0
    mixed = hashes * np.uint64(0x9E3779B97F4A7C15)  # the order itself is by hash
    for i, (mark, size) in enumerate(zip(mixed.tolist(), sizes.tolist(), strict=True)):
        if filled and filled + size > unit_pairs:
            unit, filled = unit + 1, 0
        units[i] = unit
        filled += size
        if mark < 2 * size / unit_pairs * 2**64:
            unit, filled = unit + 1, 0
    _, dense = np.unique(units, return_inverse=True)
    return dense


def order_candidates(pairs: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """Return each document of a query once, in retrieval order, and how many rows each stands for.

    Ranks order, then scores, then ids; where there are scores and no ranks, ranks are made.

    Returns:
        PAIRS, queries side by side; and int64, the further rows of the same query and document.
    """
    if not len(pairs):
        return pairs, np.empty(0, np.int64)
    pairs = pairs.combine_chunks()
    queries = pairs["query_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    documents = pairs["doc_id"].combine_chunks().dictionary_encode()
    names = pc.rank(documents.dictionary, tiebreaker="dense").to_numpy()
    names = names[documents.indices.to_numpy()].astype(np.int64)
    ranks = pairs["retrieval_rank"].fill_null(_NO_RANK).to_numpy()
    scores = pairs["retrieval_score"].fill_null(-np.inf).to_numpy()
    order = np.lexsort((np.arange(len(pairs)), names, -scores, ranks, queries))
    both = queries[order].astype(np.int64) * (int(names.max()) + 1) + names[order]
    _, first, inverse = np.unique(both, return_index=True, return_inverse=True)
    repeats = np.bincount(inverse) - 1
    kept = np.argsort(first, kind="stable")
    ordered = pairs.take(pa.array(order[first[kept]]))
    return _with_ranks(ordered, queries[order[first[kept]]]), repeats[kept]


def _with_ranks(ordered: pa.Table, queries: np.ndarray) -> pa.Table:
    starts = np.flatnonzero(np.append(True, queries[1:] != queries[:-1]))
    sizes = np.diff(np.append(starts, len(queries)))
    made = pa.array((np.arange(len(queries)) - np.repeat(starts, sizes) + 1).astype(np.int32))
    has_score = pc.is_valid(ordered["retrieval_score"])
    made = pc.if_else(has_score, made, pa.scalar(None, pa.int32()))
    ranks = pc.coalesce(ordered["retrieval_rank"], made)
    position = ordered.schema.get_field_index("retrieval_rank")
    return ordered.set_column(position, PAIRS.field("retrieval_rank"), ranks)


def unit_stats(row: pa.Table) -> dict[str, Any]:
    """Return the counts a unit was stored with."""
    stats: dict[str, Any] = json.loads(row["stats"][0].as_py())
    return stats

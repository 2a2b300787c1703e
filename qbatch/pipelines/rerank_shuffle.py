"""The first half of the join: candidates, queries and documents go to the part they belong to.

Everything of one query meets in one part, named by the hash of the query's id. Each task reads a
bounded piece of an input and writes one file with a segment for each part: immutable, named by what
it was made from, and complete if it is there. Of the corpus only documents travel that a candidate
names, once to each part that needs them. To know these, every node that reads the corpus holds
twelve bytes a candidate: 1.2 GB for 100 million. Imports no torch.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.reading import read_unit
from qbatch.corpus.spans import Unit
from qbatch.pipelines.rerank_sources import CandidateSource, full_texts, read_pairs
from qbatch.pipelines.segment_files import (
    find_segment,
    read_segment,
    table_bytes,
    table_of,
    write_segments,
)
from qbatch.storage import Storage

_LITTLE_ENDIAN_64 = np.dtype("<u8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which documents are candidates, and in which parts."""

    hashes: np.ndarray
    """uint64, sorted: of document ids. Two ids of one hash only send a document too many."""
    parts: np.ndarray
    """int32, the part of each."""


def stable_hashes(ids: pa.ChunkedArray) -> np.ndarray:
    """Return uint64 hashes of ids that are the same in every process and release."""
    encoded = ids.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    values = encoded.dictionary.to_pylist()
    digests = b"".join(hashlib.blake2b(v.encode(), digest_size=8).digest() for v in values)
    hashes: np.ndarray = np.frombuffer(digests, _LITTLE_ENDIAN_64)[encoded.indices.to_numpy()]
    return hashes


def parts_of(ids: pa.ChunkedArray, num_parts: int) -> np.ndarray:
    """Return the part of each query id, int32."""
    return (stable_hashes(ids) % num_parts).astype(np.int32)


def shuffle_candidates(
    storage: Storage, path: str, part: str, *, source: CandidateSource, num_parts: int
) -> None:
    """Write segments of PAIRS by part, then the rejects, then which documents are wanted where."""
    pairs, rejects, _ = read_pairs(part, source)
    parts = parts_of(pairs["query_id"], num_parts)

    def segments() -> Iterator[bytes]:
        yield from _by_part(pairs, parts, num_parts)
        yield table_bytes(rejects)
        if source.has_texts:
            yield b""
        else:
            keys = _distinct(stable_hashes(pairs["doc_id"]), parts)
            yield table_bytes(pa.table({"hash": keys.hashes, "part": keys.parts}))

    write_segments(storage, path, segments())


def _by_part(table: pa.Table, parts: np.ndarray, num_parts: int) -> Iterator[bytes]:
    order = np.argsort(parts, kind="stable")
    bounds = np.searchsorted(parts[order], np.arange(num_parts + 1))
    for i in range(num_parts):
        yield table_bytes(table.take(pa.array(order[bounds[i] : bounds[i + 1]])))


def _distinct(hashes: np.ndarray, parts: np.ndarray) -> Wanted:
    order = np.lexsort((parts, hashes))
    hashes, parts = hashes[order], parts[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (hashes[1:] != hashes[:-1]) | (parts[1:] != parts[:-1])
    return Wanted(hashes=hashes[is_new], parts=parts[is_new])


def collect_wanted(storage: Storage, files: Sequence[tuple[str, int]], num_parts: int) -> Wanted:
    """Return which documents the candidates of all files name, and in which parts."""
    tables = []
    for path, size in files:
        found = find_segment(storage, path, size, number=num_parts + 1, count=num_parts + 2)
        tables.append(table_of(read_segment(storage, found)))
    table = pa.concat_tables(tables)
    return _distinct(table["hash"].to_numpy(), table["part"].to_numpy())


def shuffle_documents(
    storage: Storage,
    path: str,
    units: Sequence[str],
    *,
    corpus: CorpusConfig,
    wanted: Wanted,
    num_parts: int,
) -> None:
    """Write segments of ``id`` and ``text`` of documents by part: only what is wanted there."""
    nothing = np.empty(0, np.int64)
    tables, rows, parts, num_rows = [_texts_schema().empty_table()], [nothing], [nothing], 0
    for unit in units:
        texts = _read_texts(unit, corpus)
        own = stable_hashes(texts["id"])
        first = np.searchsorted(wanted.hashes, own, "left")
        counts = np.searchsorted(wanted.hashes, own, "right") - first
        kept = np.flatnonzero(counts)
        tables.append(texts.take(pa.array(kept)))
        counts, first = counts[kept], first[kept]
        # Of a document wanted in three parts: its first place in ``wanted`` and the two after it.
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        parts.append(wanted.parts[np.repeat(first, counts) + steps])
        rows.append(np.repeat(np.arange(num_rows, num_rows + len(kept)), counts))
        num_rows += len(kept)
    table = pa.concat_tables(tables)
    in_parts, in_rows = np.concatenate(parts), np.concatenate(rows)
    write_segments(storage, path, _routed(table, in_rows, in_parts, num_parts))


def _routed(
    table: pa.Table, rows: np.ndarray, parts: np.ndarray, num_parts: int
) -> Iterator[bytes]:
    order = np.argsort(parts, kind="stable")
    rows, bounds = rows[order], np.searchsorted(parts[order], np.arange(num_parts + 1))
    for i in range(num_parts):
        yield table_bytes(table.take(pa.array(rows[bounds[i] : bounds[i + 1]])))


def shuffle_queries(
    storage: Storage, path: str, units: Sequence[str], *, queries: CorpusConfig, num_parts: int
) -> None:
    """Write segments of ``id`` and ``text`` of queries by part."""
    table = pa.concat_tables(_read_texts(unit, queries) for unit in units)
    parts = parts_of(table["id"], num_parts)
    write_segments(storage, path, _by_part(table, parts, num_parts))


def _texts_schema() -> pa.Schema:
    return pa.schema([("id", pa.large_string()), ("text", pa.large_string())])


def _read_texts(unit: str, corpus: CorpusConfig) -> pa.Table:
    documents = read_unit(Unit.from_json(unit), corpus).documents
    columns = [documents["doc_id"], full_texts(documents)]
    return pa.table(columns, schema=_texts_schema())

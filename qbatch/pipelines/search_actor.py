"""The actor that holds shards and searches blocks of queries in them.

Shards are held in groups that fit one actor. An actor with all shards finishes a block by itself;
else each shard's hits are stored as a partial result, and a later task merges those of a block.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qbatch.index.device import use_threads
from qbatch.index.files import read_index
from qbatch.index.filters import filter_columns, matching_rows, parse_filter
from qbatch.index.rescoring import StoredVectors
from qbatch.index.searching import (
    CoarseAssignment,
    ShardSearcher,
    can_merge,
    can_share_assignment,
    hits_table,
    merge_hits,
)
from qbatch.manifest import fingerprint_id, read_verified
from qbatch.pipelines.index_parts import read_part
from qbatch.pipelines.search_queries import Queries, QueryBlock
from qbatch.pipelines.search_task import SearchTask, StoredShard
from qbatch.pipelines.unit_files import (
    read_partial,
    write_partial,
    write_rejects,
    write_unit_file,
)
from qbatch.schema import LOCATED_RUN, RUN
from qbatch.storage import Storage

_FILES_KEPT = 2
"""Query files kept in memory: blocks of one file come one after the other."""


class SearchActor:
    """Holds a group of shards at a time; calls may overlap, FAISS runs for one of them."""

    def __init__(self, task: SearchTask, groups: Sequence[Sequence[StoredShard]]) -> None:
        self._task = task
        self._groups = groups
        self._held = -1
        self._searchers: dict[int, ShardSearcher] = {}
        self._files: dict[str, pa.Table] = {}
        self._lock = threading.Lock()
        self._file_lock = threading.Lock()

    def search(self, block: QueryBlock, group: int, shards: Sequence[int]) -> dict[str, Any]:
        """Search a block in some shards of a group and store what is found.

        Args:
            block: Which queries.
            group: Number of the group that holds the shards.
            shards: Numbers of the shards; all that exist finish the block.

        Returns:
            ``seconds`` by stage, ``span``, when shards were ready and when the block was done, by
            the clock, and ``output``, a row of OUTPUTS, once the block is finished.
        """
        seconds: dict[str, float] = {}
        with _timed(seconds, "read"):
            queries = self._read(block)
        with self._lock:
            use_threads(self._task.num_threads)
            with _timed(seconds, "load"):
                self._hold(group)
            ready_at = time.time()
            with _timed(seconds, "search"):
                tables = self._search(queries, shards)
        with _timed(seconds, "write"):
            output = self._store(block, queries, tables)
        return {"seconds": seconds, "span": (ready_at, time.time()), "output": output}

    def _read(self, block: QueryBlock) -> Queries:
        with self._file_lock:
            if block.path not in self._files:
                while len(self._files) >= _FILES_KEPT:
                    del self._files[next(iter(self._files))]
                self._files[block.path] = self._task.source.read_file(block)
            file = self._files[block.path]
        return self._task.source.queries(file, block)

    def _hold(self, group: int) -> None:
        if self._held == group:
            return
        self._searchers = {}  # frees the old group before the new one is loaded
        self._searchers = load_group(
            self._task, self._groups[group], may_merge=len(self._groups) == 1
        )
        self._held = group

    def _search(self, queries: Queries, shards: Sequence[int]) -> dict[int, pa.Table]:
        held = [s for s in self._groups[self._held] if s.number in self._searchers]
        chosen = {s.number: s for s in held if s.number in shards}
        options, vectors = self._task.options, queries.vectors
        assignment = None
        first = self._searchers[next(iter(chosen))].index
        if len(vectors) and can_share_assignment(first):
            assignment = CoarseAssignment(first, vectors, options.effort)
        tables = {}
        for number, shard in chosen.items():
            searcher = self._searchers[number]
            found = searcher.search(
                vectors,
                options,
                own_ids=queries.ids if self._task.exclude_self else None,
                assignment=assignment,
            )
            tables[number] = hits_table(found, searcher, shard.row_base)
        return tables

    def _store(
        self, block: QueryBlock, queries: Queries, tables: Mapping[int, pa.Table]
    ) -> dict[str, Any] | None:
        if len(self._groups) == 1:
            return write_block(self._task, block, queries, list(tables.values()))
        by_number = {s.number: s for group in self._groups for s in group}
        for number, table in tables.items():
            key = partial_key(self._task, block, by_number[number])
            write_partial(Storage(self._task.output), key, table)
        return None


def partial_key(task: SearchTask, block: QueryBlock, shard: StoredShard) -> str:
    """Return the name of what one shard has for one block."""
    own = {**task.fingerprint, "shards": shard.key, "row_base": shard.row_base}
    return block.key(fingerprint_id(own))


def load_group(
    task: SearchTask, shards: Sequence[StoredShard], *, may_merge: bool
) -> dict[int, ShardSearcher]:
    """Return the searchers of some shards by number, checked against the index's manifest.

    Where that is faster and allowed, all become one, known by the number of the first.
    """
    if not may_merge or task.options.rescore:
        return {shard.number: load_shard(task, shard) for shard in shards}
    index, first_ids, first_allowed = _read_shard(task, shards[0])
    if not can_merge(index):
        return {shard.number: load_shard(task, shard) for shard in shards}
    ids, allowed = [first_ids], [first_allowed]
    for shard in shards[1:]:
        part, part_ids, part_allowed = _read_shard(task, shard)
        index.merge_from(part, index.ntotal)
        ids.append(part_ids)
        allowed.append(part_allowed)
    whole = ShardSearcher(
        index,
        pa.concat_tables(ids, promote_options="permissive").combine_chunks(),
        task.column.metric,
        allowed=_joined(allowed, [len(part) for part in ids]),
    )
    return {shards[0].number: whole}


def _joined(masks: Sequence[np.ndarray | None], sizes: Sequence[int]) -> np.ndarray | None:
    """Return masks one after the other; None stands for all rows."""
    if all(mask is None for mask in masks):
        return None
    whole = [
        np.ones(size, bool) if mask is None else mask
        for mask, size in zip(masks, sizes, strict=True)
    ]
    return np.concatenate(whole)


def load_shard(task: SearchTask, shard: StoredShard) -> ShardSearcher:
    """Return a shard ready to be searched, checked against the index's manifest."""
    index, ids, allowed = _read_shard(task, shard)
    return ShardSearcher(
        index,
        ids,
        task.column.metric,
        allowed=allowed,
        rescorer=_stored_vectors(task, shard) if task.options.rescore else None,
    )


def _read_shard(task: SearchTask, shard: StoredShard) -> tuple[Any, pa.Table, np.ndarray | None]:
    """Return the index, the ids and which rows may be found; None is all."""
    storage, column = Storage(task.index), task.column
    filtered = filter_columns(task.filter) if task.filter else []
    columns = list(dict.fromkeys(["doc_id", "passage_id", *filtered]))
    data = read_verified(storage, shard.ids)
    ids = pq.read_table(pa.BufferReader(data), columns=columns).combine_chunks()
    allowed = None
    if task.filter is not None:
        allowed = matching_rows(ids, parse_filter(task.filter))
    if len(task.tombstones):
        deleted = pc.is_in(ids["doc_id"], task.tombstones).to_numpy(zero_copy_only=False)
        allowed = ~deleted if allowed is None else allowed & ~deleted
    if len(shard.dead):
        allowed = np.ones(len(ids), bool) if allowed is None else allowed
        allowed[shard.dead] = False
    index = read_index(storage, shard.index, dim=column.dim, metric=column.metric)
    return index, ids, allowed


def _stored_vectors(task: SearchTask, shard: StoredShard) -> StoredVectors:
    table, column = task.vectors_table(), task.column
    matrices = (column.matrix(read_part(table, part, [column.name])) for part in shard.parts)
    return StoredVectors(matrices, rows=shard.rows, dim=column.dim)


def merge_block(task: SearchTask, block: QueryBlock, paths: Sequence[str]) -> dict[str, Any]:
    """Finish a block from the partial results of all shards; return its row of OUTPUTS."""
    queries = task.source.queries(task.source.read_file(block), block)
    storage = Storage(task.output)
    return write_block(task, block, queries, [read_partial(storage, path) for path in paths])


def write_block(
    task: SearchTask, block: QueryBlock, queries: Queries, tables: Sequence[pa.Table]
) -> dict[str, Any]:
    """Merge the hits of all shards and write the run of a block; return its row of OUTPUTS."""
    hits = merge_hits(tables, task.options.top_k)
    columns = {
        **{name: hits[name] for name in ("doc_id", "passage_id", "rank", "score")},
        "query_id": queries.ids.take(hits["query"]),
        "query_row": queries.rows[hits["query"].to_numpy()],
        "row": hits["row"],
    }
    schema = LOCATED_RUN if task.locate else RUN
    run = pa.table([columns[name] for name in schema.names], schema=schema)
    rejected = pc.value_counts(queries.rejects["reason"]).to_pylist()
    counts = {
        "queries": len(queries.ids) + queries.rejects.num_rows,
        "searched": len(queries.ids),
        "without_hits": len(queries.ids) - len(np.unique(hits["query"].to_numpy())),
        "rejected": {str(entry["values"]): entry["counts"] for entry in rejected},
    }
    storage, key = Storage(task.output), block.key(task.run_fingerprint)
    record = {
        "unit_key": key,
        "fingerprint": task.run_fingerprint,
        "counts": counts,
        "rejects": write_rejects(storage, key, queries.rejects),
    }
    return write_unit_file(storage, record, run)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started

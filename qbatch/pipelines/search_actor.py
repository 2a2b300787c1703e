"""The actor that holds shards and searches blocks of queries in them.

Shards are held in groups that fit one actor. An actor with all shards finishes a block by itself;
else each shard's hits are stored as a partial result, and a later task merges those of a block.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qbatch.index.device import use_threads
from qbatch.index.rescoring import StoredVectors
from qbatch.index.searching import (
    CoarseAssignment,
    ShardSearcher,
    can_merge,
    can_share_assignment,
    hits_table,
    merge_hits,
)
from qbatch.index.stored import LoadedShard, StoredShard, load_shard
from qbatch.manifest import fingerprint_id
from qbatch.pipelines.compute_thread import ComputeThread
from qbatch.pipelines.index_parts import read_part
from qbatch.pipelines.search_queries import Queries, QueryBlock
from qbatch.pipelines.search_task import SearchTask
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
        self._thread = ComputeThread()
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
        tables, ready_at = self._thread.run(self._search_group, queries, group, shards, seconds)
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

    def _search_group(
        self, queries: Queries, group: int, shards: Sequence[int], seconds: dict[str, float]
    ) -> tuple[dict[int, pa.Table], float]:
        """Return the hits of each shard, and when the shards were there."""
        use_threads(self._task.num_threads)
        with _timed(seconds, "load"):
            self._hold(group)
        ready_at = time.time()
        with _timed(seconds, "search"):
            return self._search(queries, shards), ready_at

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
        if len(vectors) and len(chosen) > 1 and can_share_assignment(first):
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
        return {shard.number: load_searcher(task, shard) for shard in shards}
    whole = _load(task, shards[0])
    if not can_merge(whole.index):
        return {shard.number: load_searcher(task, shard) for shard in shards}
    loaded = [whole]
    for shard in shards[1:]:
        part = _load(task, shard)
        whole.index.merge_from(part.index, whole.index.ntotal)
        loaded.append(replace(part, index=whole.index))
    merged = ShardSearcher(
        whole.index,
        pa.concat_tables([s.ids for s in loaded], promote_options="permissive").combine_chunks(),
        task.column.metric,
        allowed=_joined_masks(loaded),
    )
    return {shards[0].number: merged}


def _joined_masks(shards: Sequence[LoadedShard]) -> np.ndarray | None:
    """Return which rows of all shards may be found; None is all."""
    if all(shard.allowed is None for shard in shards):
        return None
    masks = [np.ones(len(s.ids), bool) if s.allowed is None else s.allowed for s in shards]
    return np.concatenate(masks)


def load_searcher(task: SearchTask, shard: StoredShard) -> ShardSearcher:
    """Return a shard ready to be searched, checked against the index's manifest."""
    loaded = _load(task, shard)
    return ShardSearcher(
        loaded.index,
        loaded.ids,
        task.column.metric,
        allowed=loaded.allowed,
        rescorer=_stored_vectors(task, shard) if task.options.rescore else None,
    )


def _load(task: SearchTask, shard: StoredShard) -> LoadedShard:
    return load_shard(
        Storage(task.index),
        shard,
        task.column,
        filter_text=task.filter,
        tombstones=task.tombstones,
    )


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

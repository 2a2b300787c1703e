"""The last step of precomputing: a run becomes the recommendations table, one row a key.

Every partition is a unit, named by its content: one that did not change is not written again.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from qbatch.errors import ConfigError, IntegrityError
from qbatch.manifest import (
    Generation,
    fingerprint_id,
    latest_generation,
    publish_change,
    read_verified,
)
from qbatch.pipelines.cluster import MAX_RETRIES
from qbatch.pipelines.finished_units import finished_units
from qbatch.pipelines.precompute_delta import Changes, compare_partition
from qbatch.pipelines.precompute_slices import Input, SliceTask, make_slices, read_slice
from qbatch.pipelines.tasks import results_as_completed
from qbatch.pipelines.unit_files import OUTPUTS, listed_files, store_plan, write_unit_file
from qbatch.schema import FILES, RECOMMENDATIONS, SCHEMA_VERSION, UNITS
from qbatch.storage import Storage

log = logging.getLogger(__name__)


def publish_recommendations(
    task: SliceTask, config: Mapping[str, Any], *, stall_timeout_s: float, single_writer: bool
) -> dict[str, Any]:
    """Make the partitions and the changes that are missing, publish them, and count.

    Args:
        task: From which run, whose keys, how many partitions.
        config: Of the job, for the manifest.
        stall_timeout_s: Seconds without progress after which the job gives up.
        single_writer: As in ``Storage``.

    Raises:
        IntegrityError: A key was lost on the way.
    """
    storage = Storage(task.output, single_writer=single_writer)
    table = _Table(
        task=task,
        storage=storage,
        current=current_recommendations(storage, task.num_partitions),
        stall_timeout_s=stall_timeout_s,
    )
    outputs, num_made = table.make_partitions()
    counts = _total_counts(outputs)
    _check_conservation(counts, task.num_searched)
    changes = table.find_changes(outputs, counts["keys"])
    draft = table.draft(outputs, counts, changes, config)
    published = publish_change(storage, draft, table.current)
    return {
        "generation": published.number,
        "keys": counts["keys"],
        "items": counts["items"],
        "keys_without_items": counts["without_items"],
        "repeated_keys": counts["queries"] - counts["keys"],
        "changed_keys": changes.changed,
        "removed_keys": changes.removed,
        "partitions_made": num_made,
        "partitions_reused": task.num_partitions - num_made,
    }


def current_recommendations(storage: Storage, num_partitions: int) -> Generation | None:
    """Return the newest generation of the output, None before the first.

    Raises:
        ConfigError: The output is another kind of table, or has another number of partitions.
    """
    current = latest_generation(storage)
    if current is None:
        return None
    if current.kind != "recommendations":
        raise ConfigError(
            f"{storage.uri} holds {current.kind}, not recommendations; give another --output"
        )
    found = current.details["num_partitions"]
    if found != num_partitions:
        raise ConfigError(
            f"num_partitions is {num_partitions}, {storage.uri} has {found} partitions; their "
            f"number stays for the life of a table. Give --num-partitions={found} or another "
            "--output"
        )
    return current


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    """What the steps of this stage share."""

    task: SliceTask
    storage: Storage
    current: Generation | None
    stall_timeout_s: float

    def make_partitions(self) -> tuple[pa.Table, int]:
        """Return OUTPUTS of all partitions in order, and how many were made now."""
        keys: list[Input] = list(self.task.source.plan_blocks())
        inputs = [*keys, *self.task.run.generation.files.to_pylist()]
        slices = make_slices(self.task, inputs, stall_timeout_s=self.stall_timeout_s)
        planned: dict[str, tuple[int, list[str]]] = {}
        for number in range(self.task.num_partitions):
            paths, digest = slices.of(number)
            planned[_unit_key(number, self.task.num_partitions, digest)] = (number, paths)
        wanted = pa.chunked_array([pa.array(list(planned), pa.string())])
        done = finished_units(self.storage, wanted, self.current)
        known = set(done["unit_key"].to_pylist())
        log.info("%d partitions planned, %d finished already", len(planned), len(known))
        make = ray.remote(max_retries=MAX_RETRIES)(_make_partition)
        refs = [
            make.remote(self.storage, key, number, paths)
            for key, (number, paths) in planned.items()
            if key not in known
        ]
        made = list(results_as_completed(refs, stall_timeout_s=self.stall_timeout_s))
        outputs = pa.concat_tables([done, pa.Table.from_pylist(made, schema=OUTPUTS)])
        by_key = {row["unit_key"]: row for row in outputs.to_pylist()}
        rows = [by_key[key] for key in planned]
        return pa.Table.from_pylist(rows, schema=OUTPUTS), len(made)

    def find_changes(self, outputs: pa.Table, num_keys: int) -> Changes:
        """Compare partitions with those of the newest generation; write what changed.

        In the first generation every key is new: the table is its own delta.
        """
        if self.current is None:
            return Changes(files=(), changed=num_keys, removed=0)
        before = _partition_entries(self.storage, self.current)
        after = outputs.select(FILES.names).to_pylist()
        compare = ray.remote(max_retries=MAX_RETRIES)(compare_partition)
        refs = [
            compare.remote(self.storage, old, new)
            for old, new in zip(before, after, strict=True)
            if old["path"] != new["path"]
        ]
        found = results_as_completed(refs, stall_timeout_s=self.stall_timeout_s)
        return Changes.sum(found)

    def draft(
        self,
        outputs: pa.Table,
        counts: Mapping[str, int],
        changes: Changes,
        config: Mapping[str, Any],
    ) -> Generation:
        """Return the generation to publish."""
        files = listed_files(outputs)
        run = self.task.run.generation
        fingerprint = {"run": dict(run.fingerprint), "top_k": self.task.top_k}
        current = self.current
        if current and (current.fingerprint, current.files) == (fingerprint, files):
            details = current.details  # what led here stays true: there is nothing to publish
        else:
            against = current.number if current else 0
            details = {
                "num_partitions": self.task.num_partitions,
                "delta": {"against": against, **changes.to_details()},
            }
        return Generation(
            kind="recommendations",
            fingerprint=fingerprint,
            config=config,
            counts={**counts, "changed_keys": changes.changed, "removed_keys": changes.removed},
            files=files,
            rejects=FILES.empty_table(),
            plan=self._store_plan(outputs),
            details=details,
        )

    def _store_plan(self, outputs: pa.Table) -> dict[str, Any]:
        rows = outputs.to_pylist()
        spans = [{"partition": i, "of": len(rows)} for i in range(len(rows))]
        planned = [
            {**row, "spans": json.dumps(span)} for row, span in zip(rows, spans, strict=True)
        ]
        return store_plan(self.storage, pa.Table.from_pylist(planned, schema=UNITS))


def _unit_key(number: int, num_partitions: int, digest: str) -> str:
    """Return the name of a partition's file: which one it is, and what is in it."""
    own = {"partition": number, "of": num_partitions, "slices": digest}
    return fingerprint_id({"schema_version": SCHEMA_VERSION, "recommendations": own})


def _partition_entries(storage: Storage, generation: Generation) -> list[dict[str, Any]]:
    """Return the FILES entries of a generation in the order of its partitions."""
    data = read_verified(storage, generation.plan or {})
    entries = pq.read_table(pa.BufferReader(data), columns=FILES.names).to_pylist()
    return list(entries)


def _total_counts(outputs: pa.Table) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for text in outputs["counts"]:
        totals.update(json.loads(text.as_py()))
    return {name: totals[name] for name in ("queries", "keys", "items", "without_items")}


def _check_conservation(counts: Mapping[str, int], searched: int) -> None:
    if counts["queries"] != searched:
        raise IntegrityError(
            f"{searched} queries were searched, {counts['queries']} came to the partitions; "
            "nothing was published. This is a bug: report it with the log"
        )


def _make_partition(
    storage: Storage, unit_key: str, number: int, paths: Sequence[str]
) -> dict[str, Any]:
    """Write one partition from its slices; return its row of OUTPUTS."""
    slices = [read_slice(storage, path, number) for path in paths]
    table, num_queries = merge_slices(slices)
    num_items = pc.list_value_length(table["items"])
    counts = {
        "queries": num_queries,
        "keys": table.num_rows,
        "items": pc.sum(num_items).as_py() or 0,
        "without_items": pc.sum(pc.equal(num_items, 0)).as_py() or 0,
    }
    record = {"unit_key": unit_key, "fingerprint": unit_key, "counts": counts, "rejects": None}
    return write_unit_file(storage, record, table)


def merge_slices(slices: Sequence[pa.Table]) -> tuple[pa.Table, int]:
    """Return RECOMMENDATIONS ordered by key, and how many queries stand behind the keys.

    Of several lists of one key, as when an id repeats in a log, the one with the best item counts.

    Args:
        slices: precompute_slices.MEMBERS, of all inputs; the rows of a list are in rank order.

    Raises:
        IntegrityError: A list belongs to no key.
    """
    if not slices:
        return RECOMMENDATIONS.empty_table(), 0
    members = pa.concat_tables(slices).combine_chunks()
    is_key = members["rank"].to_numpy() == 0
    keys = pc.unique(members["key"].filter(pa.array(is_key)))
    keys = keys.take(pc.sort_indices(keys))
    code = pc.index_in(members["key"], keys).fill_null(-1).to_numpy()
    if (code < 0).any():
        raise IntegrityError(
            f"the run has rows of {members['key'][int(code.argmin())].as_py()!r}, which is not "
            "among its queries; nothing was published. Give the queries that were searched"
        )
    order = _rows_of_best_lists(members, code, np.flatnonzero(~is_key))
    offsets = np.cumsum([0, *np.bincount(code[order], minlength=len(keys))])
    struct = RECOMMENDATIONS.field("items").type.value_type
    chosen = members.select(["doc_id", "score"]).take(pa.array(order)).combine_chunks()
    items = pa.StructArray.from_arrays(
        [_array(chosen["doc_id"]), _array(chosen["score"])], fields=list(struct)
    )
    lists = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), items, type=RECOMMENDATIONS.field("items").type
    )
    return pa.table([keys, lists], schema=RECOMMENDATIONS), int(is_key.sum())


def _array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _rows_of_best_lists(members: pa.Table, code: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return those rows that belong to the best list of their key, by code of key and rank."""
    if not len(rows):
        return rows
    rank, score = members["rank"].to_numpy()[rows], members["score"].to_numpy()[rows]
    list_of = np.cumsum(rank == 1) - 1
    best_score = score[rank == 1][list_of]
    order = np.lexsort((rank, list_of, -best_score, code[rows]))
    ordered_code, ordered_list = code[rows][order], list_of[order]
    starts = np.flatnonzero(np.diff(ordered_code, prepend=-1))
    first = np.repeat(starts, np.diff(starts, append=len(order)))
    chosen: np.ndarray = rows[order[ordered_list == ordered_list[first]]]
    return chosen

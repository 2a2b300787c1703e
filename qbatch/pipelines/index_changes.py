"""What a night's change means for an index: rows to add, and rows of old shards to forget.

Only files that are gone or new are compared, row by row; of the shards, one column is read to find
the rows that have to go. Driver memory: 32 bytes for each row of those files.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from qbatch.index.changes import RowChanges, row_hashes
from qbatch.manifest import read_verified
from qbatch.pipelines.cluster import MAX_RETRIES
from qbatch.pipelines.index_task import IndexTask
from qbatch.pipelines.tasks import results_as_completed
from qbatch.schema import PARTS
from qbatch.storage import Storage

log = logging.getLogger(__name__)

_CONTENT = "content_hash"


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexChanges:
    """What to do to the shards of an index."""

    parts: pa.Table
    """schema.PARTS: the rows to be added."""
    dead: dict[int, list[int]]
    """Rows to be forgotten, by the place of their shard in the plan; rising."""

    @property
    def num_dead(self) -> int:
        """Rows to be forgotten."""
        return sum(map(len, self.dead.values()))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Hashes:
    """Of the rows of one part."""

    rows: np.ndarray
    """S16, (rows,)."""
    contents: np.ndarray
    """S16, (rows,): of their documents."""


def find_changes(
    task: IndexTask,
    before: pa.Table,
    now: pa.Table,
    shards: Sequence[Mapping[str, Any]],
    *,
    stall_timeout_s: float,
) -> IndexChanges | None:
    """Compare two generations of a vectors table, and find what went in the shards.

    None if the shards do not hold all that went: a kept column whose type differs from file to file
    may read otherwise in a shard. They have to be built anew then.

    Args:
        task: What all processes of the build share.
        before: schema.PARTS that the shards were last brought in line with.
        now: schema.PARTS.
        shards: schema.SHARDS, the plan of the index.
        stall_timeout_s: Seconds without progress after which the job gives up.
    """
    shared = ray.put(task)
    removed, added = _only_in(before, now), _only_in(now, before)
    hashes = _hash_parts(shared, [*removed, *added], stall_timeout_s)
    old, new = hashes[: len(removed)], hashes[len(removed) :]
    changes = RowChanges(_joined(old, "rows"), _joined(new, "rows"))
    log.info(
        "%d files are gone, %d are new; in them %d rows went and %d came",
        len(removed),
        len(added),
        changes.num_gone,
        len(changes.new),
    )
    dead = _find_dead(shared, shards, changes, old, stall_timeout_s) if changes.num_gone else {}
    found = IndexChanges(parts=_selected_parts(added, changes.new), dead=dead)
    if found.num_dead < changes.num_gone:
        log.warning("%d of the rows that went are in no shard", changes.num_gone - found.num_dead)
        return None
    return found


def _only_in(parts: pa.Table, others: pa.Table) -> list[dict[str, Any]]:
    known = set(others["sha256"].to_pylist())
    rows: list[dict[str, Any]] = parts.to_pylist()
    return [part for part in rows if part["sha256"] not in known]


def _hash_parts(
    task: "ray.ObjectRef[IndexTask]", parts: Sequence[dict[str, Any]], stall_timeout_s: float
) -> list[_Hashes]:
    hash_part = ray.remote(max_retries=MAX_RETRIES)(_hash_part)
    refs = [hash_part.remote(task, part, number) for number, part in enumerate(parts)]
    found = dict(results_as_completed(refs, stall_timeout_s=stall_timeout_s))
    return [found[number] for number in range(len(parts))]


def _hash_part(task: IndexTask, part: Mapping[str, Any], number: int) -> tuple[int, _Hashes]:
    table = task.table().read_file(part, task.columns).select(list(task.columns))
    contents = np.array(table[_CONTENT].to_pylist(), "S16")
    return number, _Hashes(rows=row_hashes(table), contents=contents)


def _joined(hashes: Sequence[_Hashes], name: str) -> np.ndarray:
    return np.concatenate([np.empty(0, "S16"), *(getattr(part, name) for part in hashes)])


def _selected_parts(parts: Sequence[dict[str, Any]], places: np.ndarray) -> pa.Table:
    """Return the parts that hold some rows, given by their places in all parts together."""
    bounds = np.cumsum([0, *(part["rows"] for part in parts)])
    owner = np.searchsorted(bounds, places, side="right") - 1
    selected = []
    for number in np.unique(owner).tolist():
        rows = places[owner == number] - bounds[number]
        selected.append({**parts[number], "rows": len(rows), "selected": rows.tolist()})
    return pa.Table.from_pylist(selected, schema=PARTS)


def _find_dead(
    task: "ray.ObjectRef[IndexTask]",
    shards: Sequence[Mapping[str, Any]],
    changes: RowChanges,
    old: Sequence[_Hashes],
    stall_timeout_s: float,
) -> dict[int, list[int]]:
    is_gone = np.isin(_joined(old, "rows"), changes.gone_hashes)
    contents = np.unique(_joined(old, "contents")[is_gone])
    wanted = ray.put((contents, changes.gone_hashes))
    find = ray.remote(max_retries=MAX_RETRIES)(_find_rows)
    refs = [
        find.remote(task, shard["ids"], shard["dead"], wanted, number)
        for number, shard in enumerate(shards)
    ]
    found = dict(results_as_completed(refs, stall_timeout_s=stall_timeout_s))
    rows = np.concatenate([found[number][0] for number in range(len(shards))])
    hashes = np.concatenate([found[number][1] for number in range(len(shards))])
    owner = np.repeat(np.arange(len(shards)), [len(found[n][0]) for n in range(len(shards))])
    chosen = changes.choose_gone(hashes)
    return {
        number: sorted(rows[chosen[owner[chosen] == number]].tolist())
        for number in np.unique(owner[chosen]).tolist()
    }


def _find_rows(
    task: IndexTask,
    ids: Mapping[str, Any],
    dead: Sequence[int],
    wanted: tuple[np.ndarray, np.ndarray],
    number: int,
) -> tuple[int, tuple[np.ndarray, np.ndarray]]:
    """Return the live rows of a shard whose hash is wanted, and the hashes, with its number."""
    contents, hashes = wanted
    data = read_verified(Storage(task.output), ids)
    table = pq.read_table(pa.BufferReader(data)).select(list(task.columns))
    own = np.array(table[_CONTENT].to_pylist(), "S16")
    rows = np.setdiff1d(np.flatnonzero(np.isin(own, contents)), np.asarray(dead, np.int64))
    found = row_hashes(table.take(pa.array(rows)))
    is_wanted = np.isin(found, hashes)
    return number, (rows[is_wanted], found[is_wanted])

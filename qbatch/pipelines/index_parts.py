"""Which vectors go into which shard: evenly, and so that a changed object changes one shard.

A vectors file is known by the object and the place in it that it comes from, which stay when the
content changes. Files keep their shard from one generation to the next; new ones go where there is
most room.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.corpus.spans import Unit
from qbatch.manifest import fingerprint_id, read_verified
from qbatch.schema import FILES, PARTS
from qbatch.tables import PublishedTable


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """What one shard is made of."""

    number: int
    parts: list[dict[str, Any]]
    """schema.PARTS, in the order their rows have in the shard."""
    dead: tuple[int, ...] = ()
    """Rows that are no longer found, rising."""
    is_delta: bool = False
    """It holds rows that came after the other shards were built."""

    @property
    def rows(self) -> int:
        """Vectors of the shard."""
        return sum(part["rows"] for part in self.parts)

    def key(self, fingerprint: str) -> str:
        """Return the name of the shard's files under everything else that changes them."""
        parts = [
            part["sha256"] if part["selected"] is None else [part["sha256"], part["selected"]]
            for part in self.parts
        ]
        return fingerprint_id({"parts": parts, "fingerprint": fingerprint})


def list_parts(table: PublishedTable) -> pa.Table:
    """Return the files of a vectors table that hold rows: schema.PARTS, in plan order."""
    plan = table.generation.plan
    if plan is None:
        files = table.generation.files
        names = files["path"].cast(pa.large_string())
    else:
        data = read_verified(table.storage, plan)
        files = pq.read_table(pa.BufferReader(data), columns=["spans", *FILES.names])
        names = pa.array(_part_names(files["spans"]), pa.large_string())
    columns = [names, *(files[name] for name in FILES.names)]
    whole = pa.nulls(len(files), PARTS.field("selected").type)
    parts = pa.table([*columns, whole], schema=PARTS)
    return parts.filter(pa.array(parts["rows"].to_numpy() > 0))


def read_part(
    table: PublishedTable, part: Mapping[str, Any], columns: Sequence[str] | None = None
) -> pa.Table:
    """Return the rows that a part stands for: all of a vectors file, or those selected of it."""
    rows = table.read_file(part, columns)
    return rows if part["selected"] is None else rows.take(pa.array(part["selected"], pa.int64()))


def _part_names(spans: pa.ChunkedArray) -> Iterator[str]:
    """Yield ``<last object of the unit>#<how often it was last before>``.

    A group of small objects ends with the object whose name makes it a border; a large object is
    cut into several units.
    """
    seen: Counter[str] = Counter()
    for text in spans:
        last = Unit.from_json(text.as_py()).spans[-1].uri
        yield f"{last}#{seen[last]}"
        seen[last] += 1


def assign_shards(
    parts: pa.Table, num_shards: int, previous: Mapping[str, int] | None = None
) -> list[ShardPlan]:
    """Return the shards that have rows.

    Args:
        parts: schema.PARTS.
        num_shards: How many to fill; no more are used than there are parts.
        previous: Shard of each part by name in the generation before, if that had as many shards.
    """
    known = previous or {}
    rows: list[dict[str, Any]] = parts.to_pylist()
    members: list[list[dict[str, Any]]] = [[] for _ in range(num_shards)]
    for part in rows:
        if part["name"] in known:
            members[known[part["name"]]].append(part)
    room = [(sum(p["rows"] for p in shard), i) for i, shard in enumerate(members)]
    heapq.heapify(room)
    # Largest first: the last ones to be placed then even out what is left.
    for part in sorted(rows, key=lambda part: (-part["rows"], part["name"])):
        if part["name"] not in known:
            filled, i = heapq.heappop(room)
            members[i].append(part)
            heapq.heappush(room, (filled + part["rows"], i))
    order = {part["name"]: place for place, part in enumerate(rows)}
    return [
        ShardPlan(number=i, parts=sorted(shard, key=lambda part: order[part["name"]]))
        for i, shard in enumerate(members)
        if shard
    ]


def planned_shard(row: Mapping[str, Any]) -> ShardPlan:
    """Return the shard that a row of schema.SHARDS describes."""
    return ShardPlan(
        number=row["shard"], parts=row["parts"], dead=tuple(row["dead"]), is_delta=row["delta"]
    )


def changed_shards(
    shards: Sequence[ShardPlan], parts: pa.Table, dead: Mapping[int, Sequence[int]]
) -> list[ShardPlan]:
    """Return shards after a change: more rows of theirs are dead, new rows have new shards.

    Args:
        shards: As they were, in row order.
        parts: schema.PARTS of the new rows.
        dead: Rows that went, by the place of their shard.
    """
    marked = [
        replace(shard, dead=tuple(sorted({*shard.dead, *dead.get(place, ())})))
        for place, shard in enumerate(shards)
    ]
    num_rows = sum(parts["rows"].to_pylist())
    num_new = -(-num_rows // max(shard.rows for shard in shards))
    first = max(shard.number for shard in shards) + 1
    new = assign_shards(parts, num_new) if num_rows else []
    return [*marked, *(replace(s, number=first + s.number, is_delta=True) for s in new)]


def sample_counts(rows: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return how many rows to draw from each part so that all rows are about equally likely.

    Args:
        rows: Of each part, int64.
        size: Wanted in all.
        rng: Decides.
    """
    if size >= rows.sum():
        return rows
    counts: np.ndarray = np.minimum(rng.multinomial(size, rows / rows.sum()), rows)
    return counts

"""Shards of a published index: what its plan says of them, and how they are loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qbatch.index.columns import VectorColumn
from qbatch.index.files import read_index
from qbatch.index.filters import filter_columns, matching_rows, parse_filter
from qbatch.manifest import Generation, fingerprint_id, read_verified
from qbatch.storage import Storage


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredShard:
    """A shard as the index's plan lists it."""

    number: int
    key: str
    """Equal where the same rows can be found."""
    row_base: int
    rows: int
    index: dict[str, Any]
    ids: dict[str, Any]
    parts: list[dict[str, Any]]
    """schema.PARTS its rows come from, in order."""
    dead: np.ndarray
    """int64, rising: rows that were deleted or replaced since it was built."""

    @property
    def num_bytes(self) -> int:
        """What it takes in memory: the index, and about three times its compressed ids."""
        return int(self.index["bytes"] + 3 * self.ids["bytes"])


def stored_shards(storage: Storage, generation: Generation) -> list[StoredShard]:
    """Return the shards of a published index, in row order."""
    plan: Mapping[str, Any] = generation.plan or {}
    rows = pq.read_table(pa.BufferReader(read_verified(storage, plan))).to_pylist()
    return [
        StoredShard(
            number=row["shard"],
            key=_searched_key(row),
            dead=np.array(row["dead"], np.int64),
            **{name: row[name] for name in ("row_base", "rows", "index", "ids", "parts")},
        )
        for row in rows
    ]


def _searched_key(row: Mapping[str, Any]) -> str:
    """Return what names the content of a shard as a search sees it."""
    key: str = row["shard_key"]
    return fingerprint_id({"shard": key, "dead": row["dead"]}) if row["dead"] else key


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedShard:
    """A shard in memory, checked against the index's manifest."""

    index: faiss.Index
    ids: pa.Table
    """Columns of the sidecar; row i belongs to vector i."""
    allowed: np.ndarray | None
    """bool, (rows,): rows that may be found; None is all."""


def load_shard(
    storage: Storage,
    shard: StoredShard,
    column: VectorColumn,
    *,
    filter_text: str | None = None,
    tombstones: pa.Array | None = None,
) -> LoadedShard:
    """Read a shard and find out which of its rows may be found.

    Args:
        storage: The index.
        shard: Which.
        column: Of the indexed vectors.
        filter_text: Expression over kept columns.
        tombstones: Ids of documents that must not be found.

    Raises:
        IntegrityError: A file is damaged, or not the one that was published.
    """
    filtered = filter_columns(filter_text) if filter_text else []
    columns = list(dict.fromkeys(["doc_id", "passage_id", *filtered]))
    data = read_verified(storage, shard.ids)
    ids = pq.read_table(pa.BufferReader(data), columns=columns).combine_chunks()
    masks = []
    if filter_text is not None:
        masks.append(matching_rows(ids, parse_filter(filter_text)))
    if tombstones is not None and len(tombstones):
        deleted = pc.is_in(ids["doc_id"], tombstones).to_numpy(zero_copy_only=False)
        masks.append(~deleted)
    if len(shard.dead):
        alive = np.ones(len(ids), bool)
        alive[shard.dead] = False
        masks.append(alive)
    return LoadedShard(
        index=read_index(storage, shard.index, dim=column.dim, metric=column.metric),
        ids=ids,
        allowed=np.logical_and.reduce(masks) if masks else None,
    )

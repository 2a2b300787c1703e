"""What every process of a search needs to know."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.index.columns import VectorColumn
from qbatch.index.searching import SearchOptions
from qbatch.manifest import Generation, fingerprint_id, read_verified
from qbatch.pipelines.search_queries import QuerySource
from qbatch.storage import Storage
from qbatch.tables import PublishedTable


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


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchTask:
    """The settings of a search that its processes share."""

    output: str
    index: str
    column: VectorColumn
    """Of the indexed vectors."""
    options: SearchOptions
    source: QuerySource
    exclude_self: bool
    locate: bool
    """The run says where queries and passages lie."""
    filter: str | None
    tombstones: pa.Array
    """Documents that must not be found any more, sorted, without repetition."""
    vectors: str
    vectors_generation: Generation | None
    """Of the table that the index was built from; only for exact scores."""
    index_fingerprint: dict[str, Any]
    shard_keys: tuple[str, ...]
    num_threads: int = 1

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything but the queries themselves that changes what is found."""
        return {
            "index": self.index_fingerprint,
            "shards": fingerprint_id({"keys": self.shard_keys}),
            "options": asdict(self.options),
            "exclude_self": self.exclude_self,
            **({"locate": True} if self.locate else {}),
            "filter": self.filter,
            "tombstones": fingerprint_id({"ids": self.tombstones.to_pylist()}),
        }

    @property
    def run_fingerprint(self) -> str:
        """Id of ``fingerprint``."""
        return fingerprint_id(self.fingerprint)

    def vectors_table(self) -> PublishedTable:
        """Return the indexed vectors; only set when exact scores are asked for."""
        if self.vectors_generation is None:
            raise ValueError("this search was planned without exact scores")
        return PublishedTable(Storage(self.vectors), self.vectors_generation)


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

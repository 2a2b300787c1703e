"""What every process of a search needs to know."""

from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from qbatch.index.columns import VectorColumn
from qbatch.index.searching import SearchOptions
from qbatch.manifest import Generation, fingerprint_id
from qbatch.pipelines.search_queries import QuerySource
from qbatch.storage import Storage
from qbatch.tables import PublishedTable


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

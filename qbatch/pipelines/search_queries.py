"""Queries as vectors, in blocks: from a published vectors table, or from a column of Parquet files.

A block is the grain of searching and resuming: up to some thousand queries of one file.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from qbatch.corpus.reasons import NON_FINITE_VECTOR, NULL_VECTOR, ZERO_VECTOR
from qbatch.corpus.spans import even_ranges
from qbatch.errors import ConfigError, NoInputError, SourceChangedError
from qbatch.index.columns import VectorColumn
from qbatch.manifest import Generation, fingerprint_id
from qbatch.schema import REJECTS, vector_matrix
from qbatch.storage import Storage, object_info, open_object
from qbatch.tables import PublishedTable

BLOCK_QUERIES = 4096
"""Enough for FAISS to fill its threads, little enough to lose when a machine is lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryBlock:
    """Some rows of one file of queries."""

    path: str
    """In the table, or the full URI of a Parquet file."""
    version: str
    """sha256 in a table, ETag or modification time of a bare file."""
    rows: int
    """Of the whole file."""
    start: int
    stop: int

    def to_json(self) -> str:
        """Return the block for a plan."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "QueryBlock":
        """Return the block that a plan holds."""
        return cls(**json.loads(text))

    def key(self, fingerprint: str) -> str:
        """Return the name of what is found for this block under a fingerprint."""
        return fingerprint_id({"block": asdict(self), "fingerprint": fingerprint})


@dataclass(frozen=True, kw_only=True, slots=True)
class Queries:
    """The queries of a block that can be searched."""

    ids: pa.Array
    """large_string."""
    vectors: np.ndarray
    """float32, (queries, dim), of unit length where the index's vectors have it."""
    rows: np.ndarray
    """int64, (queries,): where they lie in their file."""
    rejects: pa.Table
    """schema.REJECTS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuerySource:
    """Where query vectors lie and how they are read; it travels."""

    uri: str
    generation: Generation | None
    """Of a published vectors table; None for Parquet files."""
    id_column: str
    column: VectorColumn

    def plan_blocks(self) -> Iterator[QueryBlock]:
        """Yield blocks that cover all queries once.

        Raises:
            NoInputError: There are none.
        """
        num_blocks = 0
        for path, version, rows in self._files():
            for start, stop in even_ranges(rows, BLOCK_QUERIES) if rows else ():
                num_blocks += 1
                yield QueryBlock(path=path, version=version, rows=rows, start=start, stop=stop)
        if not num_blocks:
            raise NoInputError(f"no queries in {self.uri}; give texts, vectors or a vectors table")

    def _files(self) -> Iterator[tuple[str, str, int]]:
        if self.generation is not None:
            for entry in self.generation.files.to_pylist():
                yield entry["path"], entry["sha256"], entry["rows"]
            return
        for info in parquet_objects(self.uri):
            with open_object(info[0]) as file:
                yield *info, pq.ParquetFile(file).metadata.num_rows

    def read_file(self, block: QueryBlock) -> pa.Table:
        """Return ids and vectors of the whole file that a block lies in.

        Raises:
            SourceChangedError: It is not the file that the plan was made from.
            IntegrityError: A published file is damaged.
        """
        if self.generation is None:
            return self._read_bare(block)
        table = PublishedTable(Storage(self.uri), self.generation)
        entry = {"path": block.path, "sha256": block.version}
        return table.read_file(entry, [self.id_column, "passage_index", self.column.name])

    def _read_bare(self, block: QueryBlock) -> pa.Table:
        found = next(parquet_objects(block.path), None)
        if found is None or found[1] != block.version:
            raise SourceChangedError(
                f"{block.path} was replaced or deleted after the job planned its work "
                f"(version {block.version}, now {found and found[1]}). Run the job again"
            )
        with open_object(block.path) as file:
            return pq.read_table(file, columns=[self.id_column, self.column.name])

    def queries(self, file: pa.Table, block: QueryBlock) -> Queries:
        """Return the queries of a block; a long text asks with its first passage.

        Args:
            file: What ``read_file`` returned.
            block: Which of its rows.
        """
        rows = file.slice(block.start, block.stop - block.start)
        numbers = np.arange(block.start, block.stop)
        if self.generation is not None:
            first = pc.equal(rows["passage_index"], 0)
            rows, numbers = rows.filter(first), numbers[first.to_numpy()]
        ids = rows[self.id_column].cast(pa.large_string()).combine_chunks()
        vectors, reasons = self._vectors(rows)
        bad = np.flatnonzero(reasons != "")
        rejects = [
            {
                "object_uri": block.path,
                "row": int(numbers[i]),
                "doc_id": ids[i].as_py(),
                "reason": str(reasons[i]),
            }
            for i in bad.tolist()
        ]
        good = np.flatnonzero(reasons == "")
        return Queries(
            ids=ids.take(pa.array(good)),
            vectors=self.column.unit(np.ascontiguousarray(vectors[good], np.float32)),
            rows=numbers[good],
            rejects=pa.Table.from_pylist(rejects, schema=REJECTS),
        )

    def _vectors(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Return the vectors, zero where there is none, and why each cannot be searched, or ""."""
        stored = rows[self.column.name].combine_chunks()
        is_null = stored.is_null().to_numpy(zero_copy_only=False)
        if self.generation is not None:
            vectors = np.array(self.column.matrix(rows))
        else:
            vectors = _given_vectors(stored, self.column)
        reasons = np.full(len(rows), "", object)
        reasons[~vectors.any(axis=1)] = ZERO_VECTOR
        reasons[~np.isfinite(vectors).all(axis=1)] = NON_FINITE_VECTOR
        reasons[is_null] = NULL_VECTOR
        return vectors, reasons


def _given_vectors(stored: pa.Array, column: VectorColumn) -> np.ndarray:
    """Return a user's list column as float32 (rows, dim), zero where it is null."""
    wanted = pa.list_(pa.float32(), column.dim)
    is_list = pt.is_list(stored.type) or pt.is_large_list(stored.type)
    if not is_list and not pt.is_fixed_size_list(stored.type):
        raise ConfigError(
            f"--vector-column={column.name} is {stored.type}; give lists of {column.dim} numbers"
        )
    if stored.null_count:
        zeros = pa.scalar([0.0] * column.dim, stored.type)
        stored = stored.fill_null(zeros)
    try:
        return np.array(vector_matrix(stored.cast(wanted)))
    except pa.ArrowInvalid as error:
        raise ConfigError(
            f"--vector-column={column.name} holds lists of another length than the index's "
            f"{column.dim} components, or nulls: {error}. Search with vectors of the index's model"
        ) from error


def parquet_objects(uri: str) -> Iterator[tuple[str, str]]:
    """Yield URI and version of a Parquet object, or of all below a directory, in name order."""
    storage = Storage(uri)
    found = False
    for info in storage.iter_objects():
        if info.path.endswith(".parquet") and info.path.rpartition("/")[2][:1] not in "._":
            found = True
            yield info.uri, info.version
    if not found and uri.endswith(".parquet"):
        info = object_info(uri)
        yield info.uri, info.version

"""Reading what was published: the newest generation of a table, file by file, checked.

table = open_vectors("s3://bucket/vectors")
for batch in table.iter_tables(columns=["doc_id", "vector"]): ...
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from qbatch.errors import NoInputError
from qbatch.manifest import Generation, latest_generation, load_generation, read_verified
from qbatch.schema import REJECTS, vector_matrix
from qbatch.storage import Storage
from qbatch.vector_files import copy_vectors, read_vector_file

T = TypeVar("T")

_FILES_AHEAD = 2
"""Read and hashed at a time, beside the one in use."""


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """One generation of a table; later publications do not change what it reads."""

    storage: Storage
    generation: Generation

    @property
    def num_rows(self) -> int:
        """Rows in all files of the generation."""
        return sum(self.generation.files["rows"].to_pylist())

    def iter_tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the content of each file in path order, its sha256 checked before it is parsed.

        The next files are read while the last one is used.
        """
        entries = self.generation.files.to_pylist()
        return read_ahead(partial(self.read_file, columns=columns), entries, num_ahead=_FILES_AHEAD)

    def to_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows at once; for tables that fit in memory."""
        return pa.concat_tables(self.iter_tables(columns), promote_options="permissive")

    def to_matrix(self, column: str = "vector") -> np.ndarray:
        """Return one vector column of all rows, shape (rows, dim), in the order of ``iter_tables``.

        Vectors go from each file to their place in one copy, where ``to_table`` needs three.

        Raises:
            NoInputError: There are no rows.
        """
        entries = [entry for entry in self.generation.files.to_pylist() if entry["rows"]]
        if not entries:
            raise NoInputError(f"no rows in {self.storage.uri}; run the job that fills it")
        first = vector_matrix(self.read_file(entries[0], [column])[column])
        bounds = np.cumsum([entry["rows"] for entry in entries]).tolist()
        # Arrow's allocator keeps large pieces: new pages would take longer than the copy.
        memory = pa.allocate_buffer(self.num_rows * first[0].nbytes)
        matrix = np.frombuffer(memory, first.dtype).reshape(-1, first.shape[1])
        matrix[: len(first)] = first

        def copy(entry: Mapping[str, Any], start: int, stop: int) -> None:
            copy_vectors(read_verified(self.storage, entry), column, matrix[start:stop])

        with ThreadPoolExecutor(_FILES_AHEAD, thread_name_prefix="read-vectors") as readers:
            for _ in readers.map(copy, entries[1:], bounds[:-1], bounds[1:]):
                pass
        return matrix

    def rejects(self) -> pa.Table:
        """Return the rejected rows of the generation, schema.REJECTS."""
        tables = [self.read_file(entry) for entry in self.generation.rejects.to_pylist()]
        return pa.concat_tables(tables) if tables else REJECTS.empty_table()

    def read_file(self, entry: Mapping[str, Any], columns: Sequence[str] | None = None) -> pa.Table:
        """Return the content of one listed file after checking its sha256."""
        return read_vector_file(read_verified(self.storage, entry), columns)


def read_ahead(
    read: Callable[[T], pa.Table], entries: Iterable[T], *, num_ahead: int
) -> Iterator[pa.Table]:
    """Yield what ``read`` returns of each entry in order; some are read beside the one in use."""
    rest = iter(entries)
    with ThreadPoolExecutor(num_ahead, thread_name_prefix="read-ahead") as readers:
        waiting = deque(readers.submit(read, entry) for entry in islice(rest, num_ahead))
        while waiting:
            table = waiting.popleft().result()
            waiting.extend(readers.submit(read, entry) for entry in islice(rest, 1))
            yield table


def open_table(uri: str, generation: int | None = None) -> PublishedTable:
    """Open a table of any kind at its newest generation, or at a given one.

    Raises:
        NoInputError: Nothing was published there.
    """
    storage = Storage(uri)
    found = load_generation(storage, generation) if generation else latest_generation(storage)
    if found is None:
        raise NoInputError(f"no published generation in {storage.uri}; run the job that fills it")
    return PublishedTable(storage, found)


def open_vectors(uri: str, generation: int | None = None) -> PublishedTable:
    """Open a vectors table at its newest generation, or at a given one.

    Raises:
        NoInputError: Nothing was published there.
    """
    return open_table(uri, generation)

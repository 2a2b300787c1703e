"""What is known of every indexed passage, by its row: for choosing among what a search found."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qbatch.errors import ConfigError
from qbatch.index.columns import VectorColumn
from qbatch.index.rescoring import StoredVectors

CONTENT_HASH = "content_hash"


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemRows:
    """What is known of the rows of one vectors file, in the codes of an ItemTable."""

    hashes: np.ndarray
    """uint64, (rows, 2): equal where the texts are."""
    groups: np.ndarray
    """int32, (rows,), or empty without groups; -1 where the group is null or unknown."""


class ItemTable:
    """Rows of an index: their texts' hashes and groups in memory, vectors in a mapped local file.

    That is 16 bytes a row, 4 more with groups, and the vectors' own size on the local disk.
    """

    def __init__(
        self,
        tables: Iterable[pa.Table],
        *,
        rows: int,
        column: VectorColumn | None = None,
        group_column: str | None = None,
    ) -> None:
        """Read tables with the columns of ``needed_columns``, in row order.

        Args:
            tables: Read once, one after the other.
            rows: In all of them.
            column: Of the vectors, if they are needed.
            group_column: What ``groups`` tells apart.
        """
        self._hashes: list[np.ndarray] = []
        self._groups: list[pa.Array] = []
        self._vectors: StoredVectors | None = None
        watched = self._watch(tables, group_column)
        if column is None:
            for _ in watched:
                pass
        else:
            matrices = (column.matrix(table) for table in watched)
            self._vectors = StoredVectors(matrices, rows=rows, dim=column.dim)
        self.hashes = np.concatenate([np.empty((0, 2), np.uint64), *self._hashes])
        """uint64, (rows, 2): equal where the texts are."""
        self.groups = np.empty(0, np.int32)
        """int32, (rows,): equal where the group column is, -1 where it is null."""
        self._group_column = group_column
        self._group_values = pa.array([], pa.large_string())
        if group_column:
            self.groups, self._group_values = _codes(self._groups)

    def _watch(self, tables: Iterable[pa.Table], group_column: str | None) -> Iterator[pa.Table]:
        for table in tables:
            self._hashes.append(_hash_words(table[CONTENT_HASH].combine_chunks()))
            if group_column is not None:
                self._groups.append(_encoded(table[group_column], group_column))
            yield table

    def rows_of(self, table: pa.Table) -> ItemRows:
        """Return the hashes and groups of other rows, with the columns of ``needed_columns``."""
        groups = np.empty(0, np.int32)
        if self._group_column is not None:
            own = _encoded(table[self._group_column], self._group_column)
            codes = pc.index_in(own.dictionary_decode(), self._group_values)
            groups = codes.fill_null(-1).to_numpy()
        return ItemRows(hashes=_hash_words(table[CONTENT_HASH].combine_chunks()), groups=groups)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of rows: float32, of the rows' shape and (dim,)."""
        if self._vectors is None:
            raise ValueError("this table was made without vectors")
        return self._vectors.take(rows)


def needed_columns(column: VectorColumn | None, group_column: str | None) -> list[str]:
    """Return what to read of a vectors table for an ``ItemTable``."""
    names = [CONTENT_HASH, column and column.name, group_column]
    return list(dict.fromkeys(name for name in names if name))


def _hash_words(hashes: pa.FixedSizeBinaryArray) -> np.ndarray:
    words = np.frombuffer(
        hashes.buffers()[1], np.uint64, count=2 * len(hashes), offset=16 * hashes.offset
    )
    return words.reshape(-1, 2).copy()  # a view would keep the whole file in memory


def _encoded(column: pa.ChunkedArray, name: str) -> pa.DictionaryArray:
    """Return values as text, encoded: files that hold only nulls have a type of their own."""
    try:
        return column.cast(pa.large_string()).dictionary_encode().combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ConfigError(
            f"column {name!r} is {column.type}, which cannot be compared ({error}); give --same a "
            "column of texts, numbers or truth values"
        ) from error


def _codes(parts: list[pa.DictionaryArray]) -> tuple[np.ndarray, pa.Array]:
    """Return the number of each value, -1 for null, and the values."""
    unified = pa.chunked_array(parts).unify_dictionaries()
    codes = [chunk.indices.fill_null(-1).to_numpy() for chunk in unified.chunks]
    return np.concatenate(codes).astype(np.int32), unified.chunk(0).dictionary

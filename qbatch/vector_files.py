"""Parquet files whose vectors can be copied out as one matrix, without Parquet's decoding.

A reader of nested columns rebuilds lists value by value. In files that we write, every row group
has its vectors in one plain, uncompressed page, so the column chunk ends with the matrix itself,
and a copy replaces the decoding. To every other reader these files are Parquet as usual.
"""

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.errors import IntegrityError
from qbatch.schema import vector_matrix

_MARK = b"qbatch.plain"
"""Key of the file's metadata: names of the columns laid out so."""

_PHYSICAL = {pa.float32(): "FLOAT", pa.float16(): "FIXED_LEN_BYTE_ARRAY"}
"""Parquet stores int8 in four bytes: such columns are decoded."""

_MAX_PAGE_BYTES = 2**30
"""Parquet counts a page's bytes in 31 bits."""

_LEVEL_BYTES = 16
"""Of each row in a page beside its values, generously."""


def write_vector_file(table: pa.Table, *, row_group_rows: int) -> memoryview:
    """Return the bytes of a Parquet file: vectors plain, all else compressed by zstd.

    Args:
        table: Its vectors are FixedSizeList columns whose names begin with ``vector``.
        row_group_rows: Most rows of a row group.
    """
    vectors = [field for field in table.schema if field.name.startswith("vector")]
    others = [
        path
        for field in table.schema
        if field not in vectors
        for path in _leaf_paths(field.type, field.name)
    ]
    plain = [field for field in vectors if _can_lie_plain(table[field.name], field)]
    widest = max((f.type.list_size * f.type.value_type.byte_width for f in plain), default=0)
    mark = {_MARK: json.dumps([field.name for field in plain]).encode()}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({**(table.schema.metadata or {}), **mark}),
        sink,
        row_group_size=min(row_group_rows, _MAX_PAGE_BYTES // (widest + _LEVEL_BYTES)),
        compression=dict.fromkeys(others, "ZSTD"),
        use_dictionary=others,
        write_statistics=others,
        data_page_size=2 * _MAX_PAGE_BYTES - 1,
        max_rows_per_page=row_group_rows,
    )
    return memoryview(sink.getvalue())


def _can_lie_plain(column: pa.ChunkedArray, field: pa.Field) -> bool:
    if not pa.types.is_fixed_size_list(field.type) or field.type.value_type not in _PHYSICAL:
        return False
    return all(c.null_count == 0 and c.values.null_count == 0 for c in column.chunks)


def _leaf_paths(data_type: pa.DataType, path: str) -> Iterator[str]:
    """Yield the Parquet column paths below a field: nested columns have one per leaf."""
    if pa.types.is_struct(data_type):
        for i in range(data_type.num_fields):
            field = data_type.field(i)
            yield from _leaf_paths(field.type, f"{path}.{field.name}")
    elif pa.types.is_list(data_type) or pa.types.is_large_list(data_type):
        yield from _leaf_paths(data_type.value_type, f"{path}.list.element")
    else:
        yield path


def read_vector_file(data: pa.Buffer, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the table in the bytes of a Parquet file, whoever wrote it.

    Args:
        data: The whole file.
        columns: Their names; None means all.

    Raises:
        IntegrityError: The file says that its vectors lie plain, and they do not.
    """
    file = pq.ParquetFile(pa.BufferReader(data))
    marked = _marked(file.metadata)
    wanted = set(file.schema_arrow.names if columns is None else columns)
    plain = [field for field in file.schema_arrow if field.name in wanted.intersection(marked)]
    names = [field.name for field in file.schema_arrow if field.name in wanted]
    table = file.read([name for name in names if name not in marked])
    for field in plain:
        vectors = _copy_matrices(data, file.metadata, field)
        table = table.add_column(names.index(field.name), field, vectors)
    return table


def copy_vectors(data: pa.Buffer, column: str, out: np.ndarray) -> None:
    """Copy a column of vectors in the bytes of a Parquet file, whoever wrote it, into ``out``.

    Args:
        data: The whole file.
        column: FixedSizeList without nulls.
        out: Shape (rows, dim), in the column's dtype.

    Raises:
        IntegrityError: The file says that its vectors lie plain, and they do not.
    """
    file = pq.ParquetFile(pa.BufferReader(data))
    if column in _marked(file.metadata):
        _fill(out, data, file.metadata, file.schema_arrow.field(column))
    else:
        out[:] = vector_matrix(file.read([column])[column])


def _marked(metadata: pq.FileMetaData) -> list[str]:
    """Return the columns that lie plain."""
    found: list[str] = json.loads((metadata.metadata or {}).get(_MARK, b"[]"))
    return found


def _copy_matrices(
    data: pa.Buffer, metadata: pq.FileMetaData, field: pa.Field
) -> pa.FixedSizeListArray:
    """Copy the vectors of all row groups into one matrix: pages are not aligned for arithmetic."""
    dim, dtype = field.type.list_size, np.dtype(field.type.value_type.to_pandas_dtype())
    # Arrow's allocator keeps large pieces; new pages for each file would take longer than the copy.
    matrix = np.frombuffer(pa.allocate_buffer(metadata.num_rows * dim * dtype.itemsize), dtype)
    _fill(matrix.reshape(-1, dim), data, metadata, field)
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix), type=field.type)


def _fill(matrix: np.ndarray, data: pa.Buffer, metadata: pq.FileMetaData, field: pa.Field) -> None:
    dim, dtype = matrix.shape[1], matrix.dtype
    number = _column_number(metadata, f"{field.name}.list.element")
    start = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunk, stop = group.column(number), start + group.num_rows
        end = chunk.data_page_offset + chunk.total_compressed_size
        first = end - group.num_rows * dim * dtype.itemsize
        if (
            chunk.physical_type != _PHYSICAL[field.type.value_type]
            or chunk.compression != "UNCOMPRESSED"
            or chunk.num_values != group.num_rows * dim
            or not 0 <= first <= end <= data.size
        ):
            raise IntegrityError(f"column {field.name!r} does not lie plain, as its file says")
        values = np.frombuffer(data, dtype, chunk.num_values, first)
        matrix[start:stop] = values.reshape(-1, dim)
        start = stop


def _column_number(metadata: pq.FileMetaData, path: str) -> int:
    group = metadata.row_group(0)
    paths = [group.column(i).path_in_schema for i in range(group.num_columns)]
    return paths.index(path)

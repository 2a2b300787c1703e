"""Files whose vectors are copied out whole hold what Arrow decodes from them."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbatch.errors import IntegrityError
from qbatch.schema import vector_array, vector_matrix
from qbatch.vector_files import copy_vectors, read_vector_file, write_vector_file


def make_table(rows: int, dtype: type, dims: tuple[int, ...]) -> pa.Table:
    rng = np.random.default_rng(0)
    columns = {"doc_id": pa.array([f"d{i}" for i in range(rows)], pa.large_string())}
    fields = [pa.field("doc_id", pa.large_string())]
    for i, dim in enumerate(dims):
        column = vector_array((50 * rng.standard_normal((rows, dim))).astype(dtype))
        columns[f"vector_{dim}" if i else "vector"] = column
        fields.append(pa.field(f"vector_{dim}" if i else "vector", column.type, nullable=False))
    tags = [[{"name": str(i), "weights": [i, None]}] if i % 3 else None for i in range(rows)]
    columns["tags"] = pa.array(tags)
    fields.append(pa.field("tags", columns["tags"].type))
    return pa.table(list(columns.values()), schema=pa.schema(fields, {b"qbatch": b"{}"}))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("rows", [0, 1, 100, 1000])
@pytest.mark.parametrize("dims", [(1,), (7,), (64, 32)])
def test_content_is_what_arrow_reads(dtype, rows, dims):
    table = make_table(rows, dtype, dims)
    data = write_vector_file(table, row_group_rows=300)
    found, arrow = read_vector_file(pa.py_buffer(data)), pq.read_table(io.BytesIO(data))
    assert found.column_names == table.column_names
    assert found.cast(table.schema).equals(table)
    assert found.equals(arrow)
    assert arrow.schema.metadata[b"qbatch"] == b"{}"
    some = read_vector_file(pa.py_buffer(data), ["vector", "tags"])
    assert some.equals(arrow.select(["vector", "tags"]))
    expected = vector_matrix(table["vector"])
    matrix = np.empty_like(expected)
    copy_vectors(pa.py_buffer(data), "vector", matrix)
    assert np.array_equal(matrix, expected)


def test_vectors_are_one_aligned_matrix():
    data = write_vector_file(make_table(1000, np.float32, (64,)), row_group_rows=300)
    matrix = vector_matrix(read_vector_file(pa.py_buffer(data), ["vector"])["vector"])
    assert matrix.ctypes.data % 64 == 0
    assert matrix.base is not None  # a view


def test_nulls_and_foreign_files_are_decoded():
    lists = pa.array([[1.0, None], [2.0, 3.0], None], pa.list_(pa.float32(), 2))
    table = pa.table({"vector": lists})
    data = write_vector_file(table, row_group_rows=10)
    assert read_vector_file(pa.py_buffer(data)).equals(table)
    sink = pa.BufferOutputStream()
    pq.write_table(make_table(50, np.float32, (8,)), sink)
    foreign = sink.getvalue()
    assert read_vector_file(foreign).equals(pq.read_table(pa.BufferReader(foreign)))


@pytest.mark.parametrize(
    "options", [{"compression": "zstd", "use_dictionary": False}, {"use_dictionary": ["vector"]}]
)
def test_a_false_mark_is_refused(options):
    mark = {b"qbatch.plain": json.dumps(["vector"]).encode()}
    sink = pa.BufferOutputStream()
    table = make_table(50, np.float32, (8,)).replace_schema_metadata(mark)
    pq.write_table(table, sink, **options)
    with pytest.raises(IntegrityError, match="does not lie plain"):
        read_vector_file(sink.getvalue())

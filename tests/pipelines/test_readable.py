"""The vectors table read by the tools people use."""

from dataclasses import replace

import datasets
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbatch.corpus.config import CorpusConfig
from qbatch.models.tokenization import TokenizerSpec
from qbatch.pipelines.embed_task import EmbedTask
from qbatch.pipelines.embed_write import vectors_table
from qbatch.pipelines.unit_files import write_unit_file
from qbatch.schema import PASSAGES, vector_matrix
from qbatch.storage import Storage

NUM_ROWS, DIM = 70_000, 8

TASK = EmbedTask(
    corpus=CorpusConfig(input="x"),
    output="",
    model="",
    revision=None,
    tokenizer=TokenizerSpec(subfolder="", vocab_rows=1, max_tokens=8, appends_end=False),
    prompt="",
    max_tokens=8,
    overlap_tokens=0,
    dims=(DIM, 4),
    normalize=True,
    dtype="float32",
    token_budget=None,
    vector_dtype="float32",
    scales=(100.0, 100.0),
)


def passages() -> pa.Table:
    numbers = pa.array(range(NUM_ROWS), pa.int32())
    uris = pa.DictionaryArray.from_arrays(pa.array(np.zeros(NUM_ROWS, np.int32)), ["s3://b/x"])
    ids = pa.array([f"d{i}" for i in range(NUM_ROWS)], pa.large_string())
    hashes = pa.array([i.to_bytes(16) for i in range(NUM_ROWS)], pa.binary(16))
    columns = [uris, numbers.cast(pa.int64()), ids, ids, *[numbers] * 4, hashes]
    fields = [PASSAGES.field(i) for i in range(len(columns))]
    nested = pa.array([{"a": [1, 2], "b": "x"}] * NUM_ROWS)
    kept = [pa.field("lang", pa.string()), pa.field("nested", nested.type)]
    schema = pa.schema([*fields, *kept])
    return pa.table([*columns, pa.array(["en"] * NUM_ROWS), nested], schema=schema)


def unit_vectors() -> np.ndarray:
    matrix = np.random.default_rng(0).standard_normal((NUM_ROWS, DIM)).astype(np.float32)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


@pytest.fixture(params=["float32", "float16", "int8"])
def file_and_matrix(request, tmp_path) -> tuple[str, np.ndarray]:
    """A published-like file in each vector dtype, and what its vectors must be."""
    matrix = unit_vectors()
    table = vectors_table(passages(), matrix, replace(TASK, vector_dtype=request.param))
    record = {"unit_key": "0" * 32, "fingerprint": "f", "counts": {}, "rejects": None}
    output = write_unit_file(Storage(str(tmp_path)), record, table)
    if request.param == "int8":
        expected = np.clip(np.rint(matrix * np.float32(100)), -127, 127).astype(np.int8)
    else:
        expected = matrix.astype(request.param)
    return str(tmp_path / output["path"]), expected


def test_pyarrow_gives_one_matrix_without_a_copy_per_row(file_and_matrix):
    file, expected = file_and_matrix
    table = pq.read_table(file)
    assert pa.types.is_fixed_size_list(table["vector"].type)
    assert table["vector"].type.list_size == DIM
    assert vector_matrix(table["vector"]).dtype == expected.dtype
    np.testing.assert_allclose(vector_matrix(table["vector"]), expected, atol=1e-3)
    chunk = table["vector"].chunk(0)
    matrix = vector_matrix(chunk)
    address = chunk.values.buffers()[1].address
    assert matrix.__array_interface__["data"][0] == address
    assert matrix.flags.c_contiguous


def test_vectors_are_stored_plain_and_the_rest_compressed(file_and_matrix):
    file, _ = file_and_matrix
    group = pq.ParquetFile(file).metadata.row_group(0)
    columns = {
        c.path_in_schema: (c.compression, c.encodings)
        for c in map(group.column, range(group.num_columns))
    }
    assert columns["vector.list.element"][0] == "UNCOMPRESSED"
    assert "PLAIN" in columns["vector.list.element"][1]
    assert {columns[p][0] for p in ("doc_id", "nested.a.list.element", "nested.b")} == {"ZSTD"}


def test_pandas(file_and_matrix):
    file, expected = file_and_matrix
    frame = pd.read_parquet(file, columns=["doc_id", "vector", "lang"])
    np.testing.assert_allclose(np.stack(frame["vector"].tolist()), expected, atol=1e-3)
    assert frame["doc_id"].iloc[3] == "d3"


def test_polars(file_and_matrix):
    file, expected = file_and_matrix
    frame = pl.read_parquet(file, columns=["object_uri", "vector"])
    assert isinstance(frame["vector"].dtype, pl.Array)
    np.testing.assert_allclose(frame["vector"].to_numpy(), expected, atol=1e-3)
    assert frame["object_uri"][0] == "s3://b/x"


def test_duckdb(file_and_matrix):
    file, expected = file_and_matrix
    rows = duckdb.sql(f"SELECT row, vector FROM '{file}' ORDER BY row LIMIT 100").fetchall()
    np.testing.assert_allclose(np.array([v for _, v in rows]), expected[:100], atol=1e-3)


def test_hugging_face_datasets(file_and_matrix, tmp_path):
    file, expected = file_and_matrix
    loaded = datasets.Dataset.from_parquet(file, cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == NUM_ROWS
    rows = loaded.with_format("numpy")[:100]
    np.testing.assert_allclose(np.stack(rows["vector"]), expected[:100], atol=1e-3)

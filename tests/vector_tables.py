"""Published vectors tables of known vectors, as the embed job lays them out, without a model."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.corpus.spans import Span, Unit
from qbatch.manifest import Generation, file_entry, latest_generation, publish
from qbatch.pipelines.unit_files import write_unit_file
from qbatch.schema import FILES, UNITS, vector_array
from qbatch.storage import Storage

FINGERPRINT = {
    "schema_version": 1,
    "weights_sha256": "w",
    "tokenizer_sha256": "t",
    "architecture": "bert",
    "pooling": "mean",
    "normalize": True,
    "prompt": "",
    "max_tokens": 128,
    "overlap_tokens": 0,
    "dims": [0],
    "dtype": "float32",
    "vector_dtype": "float32",
    "scales": [],
}


def clustered(rows: int, dim: int, *, clusters: int = 50, seed: int = 0) -> np.ndarray:
    """Return unit vectors around some centres: float32, (rows, dim)."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, dim))
    vectors = centres[rng.integers(0, clusters, rows)] + 0.7 * rng.standard_normal((rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def rows_table(
    vectors: np.ndarray, doc_ids: Sequence[str], kept: Mapping[str, Sequence] | None = None
) -> pa.Table:
    """Return rows of a vectors table, one passage a document unless ids repeat in a row."""
    return pa.table(
        {
            "doc_id": pa.array(doc_ids, pa.large_string()),
            "passage_id": pa.array([f"{d}#{i}" for i, d in enumerate(doc_ids)], pa.large_string()),
            "passage_index": passage_indexes(doc_ids),
            "content_hash": pa.array([blake2b(v.tobytes()) for v in vectors], pa.binary(16)),
            "vector": vector_array(vectors),
            **(kept or {}),
        }
    )


def blake2b(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def passage_indexes(doc_ids: Sequence[str]) -> pa.Array:
    """Return the place of each row among neighbours with the same id."""
    indexes = [0] * len(doc_ids)
    for i in range(1, len(doc_ids)):
        indexes[i] = indexes[i - 1] + 1 if doc_ids[i] == doc_ids[i - 1] else 0
    return pa.array(indexes, pa.int32())


def write_vectors(
    uri: str, files: Mapping[str, pa.Table], *, fingerprint: Mapping | None = None
) -> Generation:
    """Publish a generation with one vectors file for each object name.

    Files of the same name and content are the same files, as after an incremental embed job.
    """
    storage = Storage(uri)
    units = []
    for name, table in files.items():
        data = table["vector"].combine_chunks().values.to_numpy().tobytes()
        unit = Unit((Span(f"corpus/{name}", table.num_rows, file_entry("", 0, data)["sha256"]),))
        record = {
            "unit_key": unit.key("test"),
            "fingerprint": "test",
            "counts": {"rows_in": table.num_rows},
            "rejects": None,
        }
        units.append({"spans": unit.to_json(), **write_unit_file(storage, record, table)})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(units, schema=UNITS), sink)
    plan = file_entry("", len(units), memoryview(sink.getvalue()))
    plan["path"] = f"plans/{plan['sha256'][:32]}.parquet"
    storage.write(plan["path"], memoryview(sink.getvalue()))
    first = next(iter(files.values()))
    base = {"doc_id", "passage_id", "passage_index", "content_hash", "vector"}
    draft = Generation(
        kind="vectors",
        fingerprint=fingerprint or FINGERPRINT | {"dims": [first["vector"].type.list_size]},
        config={"keep_columns": [name for name in first.column_names if name not in base]},
        counts={},
        files=pa.table([[unit[name] for unit in units] for name in FILES.names], schema=FILES),
        rejects=FILES.empty_table(),
        plan=plan,
    )
    current = latest_generation(storage)
    return publish(storage, draft, after=current.number if current else 0)


def split_files(table: pa.Table, num_files: int) -> dict[str, pa.Table]:
    """Return a table as so many files of about equal size."""
    bounds = np.linspace(0, len(table), num_files + 1).astype(int)
    return {
        f"{i:03d}.jsonl": table.slice(a, b - a)
        for i, (a, b) in enumerate(pairwise(bounds.tolist()))
    }

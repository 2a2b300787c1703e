"""Reading vectors back: our files beside a plain Parquet file of float lists.

    python -m tests.benchmarks.bench_vectors_read --rows 200000 --dim 384 --turns 5

Both sides end with one float32 matrix in memory. The plain file is what ``pq.write_table`` makes of
a ``list<float>`` column by default; its lists are flattened in one call, which is the fastest way.
Our side reads a published table by its manifest. Files lie in the page cache, where they were just
written.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.tables import open_vectors
from tests.benchmarks.bench_embed_engine import describe_machine, seconds
from tests.benchmarks.table import Row
from tests.vector_tables import clustered, rows_table, split_files, write_vectors

NUM_FILES = 8


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run the turns and return the one row."""
    options = parse_options(arguments)
    print(describe_machine(pa.cpu_count(), options.rows).replace("texts", "vectors"))
    with tempfile.TemporaryDirectory() as folder:
        vectors = clustered(options.rows, options.dim)
        ids = [f"d{i}" for i in range(options.rows)]
        write_vectors(f"{folder}/table", split_files(rows_table(vectors, ids), NUM_FILES))
        write_plain(f"{folder}/plain.parquet", vectors, ids)
        if not np.array_equal(read_table(folder), read_plain(folder)):
            raise AssertionError("the two sides read different vectors")
        turns = [
            (
                seconds(lambda: read_table(folder), time.perf_counter),
                seconds(lambda: read_plain(folder), time.perf_counter),
            )
            for _ in range(options.turns)
        ]
    row = Row.of_turns(
        turns,
        options.rows,
        case=f"reading {options.rows:,} vectors of {options.dim}",
        against="list<float> Parquet",
        unit="vectors/s",
        goal=5.0,
    )
    print(f"ours {row.ours:,.0f}/s, plain {row.theirs:,.0f}/s, {row.ratio:.1f} times")
    if options.json:
        options.json.write_text(json.dumps([row.to_json()], indent=1))
    return [row]


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def write_plain(path: str, vectors: np.ndarray, ids: list[str]) -> None:
    offsets = pa.array(np.arange(len(vectors) + 1) * vectors.shape[1], pa.int32())
    lists = pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1)))
    pq.write_table(pa.table({"doc_id": ids, "vector": lists}), path)


def read_table(folder: str) -> np.ndarray:
    return open_vectors(f"{folder}/table").to_matrix()


def read_plain(folder: str) -> np.ndarray:
    column = pq.read_table(f"{folder}/plain.parquet", columns=["vector"])["vector"]
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)


if __name__ == "__main__":
    main()

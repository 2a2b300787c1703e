"""FAISS as its wiki calls it, for bench_index: ``plain_faiss build '{"argument": ...}'``.

Read everything, train, add, write; or load and search. Prints one JSON object.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq

from qbatch.schema import vector_matrix


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


def build(  # one process as users write it
    files: list[str], factory: str, sample_rows: int, threads: int, output: str, template: str
) -> dict:
    """Build one index; an existing ``template`` is taken, else trained and left there."""
    faiss.omp_set_num_threads(threads)
    seconds: dict[str, float] = {}
    with timed(seconds, "read"):
        vectors = read_vectors(files)
    if Path(template).exists():
        index = faiss.read_index(template)
    else:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_L2)
        chosen = np.random.default_rng(0).choice(len(vectors), sample_rows, replace=False)
        with timed(seconds, "train"):
            index.train(vectors[chosen])
        faiss.write_index(index, template)
    with timed(seconds, "add"):
        index.add(vectors)
    with timed(seconds, "write"):
        faiss.write_index(index, output)
    return {"seconds": seconds}


def read_vectors(files: list[str]) -> np.ndarray:
    """Return the vectors of all files in one matrix that is filled as they are read."""
    rows = [pq.read_metadata(file).num_rows for file in files]
    bounds = np.cumsum([0, *rows])
    matrix = None
    for file, start, stop in zip(files, bounds[:-1], bounds[1:], strict=True):
        part = vector_matrix(pq.read_table(file, columns=["vector"])["vector"])
        if matrix is None:
            matrix = np.empty((bounds[-1], part.shape[1]), np.float32)
        matrix[start:stop] = part
    return matrix


def search(
    files: list[str], index: str, top_k: int, nprobe: int, threads: int, output: str
) -> dict:
    """Search all queries with one call; leave the rows found in ``output``."""
    faiss.omp_set_num_threads(threads)
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        loaded = faiss.read_index(index)
        queries = read_vectors(files)
    parameters = faiss.SearchParametersIVF(nprobe=nprobe)
    with timed(seconds, "search"):
        distances, rows = loaded.search(queries, top_k, params=parameters)
    np.savez(output, rows=rows, scores=1 - distances / 2)
    return {"seconds": seconds}


SIDES: dict[str, Callable] = {"build": build, "search": search}

if __name__ == "__main__":
    print(json.dumps(SIDES[sys.argv[1]](**json.loads(sys.argv[2]))))

"""What a document costs as a corpus grows: embedding by a tiny random model, and indexing.

    python -m tests.benchmarks.scale_documents --documents 10000 100000 1000000

Short made-up texts in Parquet files of 50,000; the model hardly computes, so that what is measured
is everything around it. Each size is a process of its own; Ray is running when the clock starts.
Memory is that of the driver, above what it had before the jobs.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from qbatch.pipelines.build_index import BuildIndexConfig, build_index
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus
from tests.benchmarks.watching import peak_bytes, told_by_process
from tests.tiny_models import write_tiny_encoder

_MODULE = "tests.benchmarks.scale_documents"
_ROWS_PER_FILE = 50_000
_WORDS = ["".join(random.Random(i).choices("abcdefghij", k=4)) for i in range(500)]


def write_corpus(folder: Path, num_documents: int) -> None:
    folder.mkdir()
    rng = random.Random(0)
    for first in range(0, num_documents, _ROWS_PER_FILE):
        numbers = range(first, min(first + _ROWS_PER_FILE, num_documents))
        texts = [f"{' '.join(rng.choices(_WORDS, k=5))} {i}" for i in numbers]
        table = pa.table({"doc_id": [f"d{i}" for i in numbers], "text": texts})
        pq.write_table(table, folder / f"{first:09d}.parquet")


def measure_jobs(folder: Path) -> dict[str, Any]:
    """Run the jobs; in a process of its own, so that its memory is known."""
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=2**30,
        include_dashboard=False,
        log_to_driver=False,
    )
    before, times = peak_bytes(), [time.perf_counter()]
    embed = EmbedCorpusConfig(
        input=f"{folder}/corpus",
        output=f"{folder}/vectors",
        model=f"{folder}/model",
        dtype="float32",
        unit_bytes=2**20,
        max_actors=1,
    )
    embedded = embed_corpus(embed)
    times.append(time.perf_counter())
    index = BuildIndexConfig(
        vectors=f"{folder}/vectors",
        output=f"{folder}/index",
        factory="IVF1024,SQ8",
        target_recall=0.5,
    )
    built = build_index(index)
    times.append(time.perf_counter())
    return {
        "passages": embedded["passages"],
        "indexed": built["ntotal"],
        "units": embedded["units_made"],
        "embed_s": times[1] - times[0],
        "index_s": times[2] - times[1],
        "grown_bytes": peak_bytes() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--only-jobs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_jobs:
        print(json.dumps(measure_jobs(options.only_jobs)))
        return
    print(
        "| documents | units | embed | ms a document | index | ms a document | driver's memory |\n"
        "|---|---|---|---|---|---|---|"
    )
    for num_documents in options.documents:
        with tempfile.TemporaryDirectory(prefix="qbatch-scale-") as name:
            folder = Path(name)
            write_tiny_encoder(folder / "model")
            write_corpus(folder / "corpus", num_documents)
            found = told_by_process(_MODULE, "--only-jobs", name)
        assert found["passages"] == found["indexed"] == num_documents, found
        print(
            f"| {num_documents:,} | {found['units']} | {found['embed_s']:.1f} s "
            f"| {1000 * found['embed_s'] / num_documents:.3f} | {found['index_s']:.1f} s "
            f"| {1000 * found['index_s'] / num_documents:.3f} "
            f"| {found['grown_bytes'] / 2**20:.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()

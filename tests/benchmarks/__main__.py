"""Every benchmark in turn, and one table of all: ``make bench`` or ``python -m tests.benchmarks``.

    python -m tests.benchmarks --only engine rerank --json bench.json

Each benchmark is also a command of its own with flags for more texts and turns. This one gives the
memory settings of our actors to what it runs in its own process, to opponents as to us; whole jobs
and scripts beside them run as their users start them.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from qbatch.models.devices import resolve_dtype
from qbatch.pipelines.cluster import KEEP_FREED_MEMORY
from tests.benchmarks import (
    bench_embed_engine,
    bench_embed_job,
    bench_embed_peers,
    bench_index,
    bench_int8_weights,
    bench_rerank,
    bench_vectors_read,
)
from tests.benchmarks.bench_embed_engine import describe_machine
from tests.benchmarks.table import Row, markdown

HAS_BFLOAT16 = resolve_dtype("auto", torch.device("cpu")) == "bfloat16"
DTYPES = ["bfloat16", "float32"] if HAS_BFLOAT16 else ["float32"]
"""Without bfloat16 instructions both sides emulate them, which says nothing."""

BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "engine": lambda: bench_embed_engine.main(["--num-texts", "80", "--dtypes", *DTYPES]),
    "deep": lambda: bench_embed_engine.main(
        [
            *("--models", "qwen3", "--layers", "28", "--num-texts", "24", "--pairs", "2"),
            "--dtypes",
            *DTYPES,
        ]
    ),
    "long": lambda: bench_embed_engine.main(
        ["--models", "qwen3", "--kind", "long documents", "--num-texts", "8", "--dtypes", *DTYPES]
    ),
    "bundled": lambda: bench_embed_engine.main(
        ["--models", "bundled", "--num-texts", "2000", "--dtypes", "float32"]
    ),
    "int8": lambda: bench_int8_weights.main(["--num-texts", "80", "--pairs", "3"]),
    "rerank": lambda: bench_rerank.main(
        ["--num-queries", "1", "--num-short", "200", "--dtypes", *DTYPES]
    ),
    "peers": lambda: bench_embed_peers.main(["--num-texts", "6000", "--turns", "2"]),
    "job": lambda: bench_embed_job.main(["--num-texts", "20000", "--pairs", "1"]),
    "read": lambda: bench_vectors_read.main([]),
    "index": lambda: bench_index.main(
        ["--rows", "200000", "--queries", "5000", "--factory", "IVF2048,SQ8", "--shards", "4"]
    ),
}
"""Sizes that fit into an hour on two cores; README also has a million vectors."""


def main() -> None:
    """Run what was asked for, and print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--json", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    variables = KEEP_FREED_MEMORY["env_vars"]
    if not variables.items() <= os.environ.items():  # glibc reads them when a process starts
        command = [sys.executable, "-m", "tests.benchmarks", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **variables})
    machine, rows = describe_machine(torch.get_num_threads(), 0), []
    for name in options.only:
        print(f"\n{name}")
        rows += BENCHMARKS[name]()
        found = {"machine": machine, "rows": [row.to_json() for row in rows]}
        options.json.write_text(json.dumps(found, indent=1))
    print(f"\n{machine}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()

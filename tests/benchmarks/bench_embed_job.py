"""The whole embed job beside the bare engine on the same texts: what reading, Ray and writing cost.

    python -m tests.benchmarks.bench_embed_job --num-texts 6000 --pairs 3 --json job.json

Both sides use MiniLM, one process with the same number of threads, and the same tokens: texts that
the model takes whole, which the job does not split. The engine gets them ready in memory. The job
reads JSONL files and writes the published table on a disk; its speed is given while its actor was
there (forward and idle seconds), and over the whole process from start to exit.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from qbatch.models.embedder import EmbedderConfig
from qbatch.models.tokenization import TextTokenizer
from tests.benchmarks.bench_embed_engine import describe_machine, require
from tests.benchmarks.bench_embed_peers import read_fitting_texts
from tests.benchmarks.embed_job import job_command, job_environment, write_corpus
from tests.benchmarks.table import Row


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run the pairs, print a line for each, then the medians, and return the row."""
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    model = require("minilm")
    texts = read_fitting_texts(model, options.num_texts)
    machine = describe_machine(options.threads, len(texts))
    print(machine)
    print(
        f"{'engine tok/s':>14}{'job tok/s':>12}{'share':>8}{'whole tok/s':>13}{'whole share':>13}"
    )
    rows = []
    for _ in range(options.pairs):
        engine = measure_engine(model, texts, options)
        rows.append({"engine_tokens_per_s": engine, **measure_job(model, texts, options)})
        print_row(rows[-1])
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print("medians")
    print_row(medians)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}))
    row = Row(
        case=f"whole job, {len(texts):,} documents, while its actor lives, MiniLM float32",
        against="the bare engine",
        unit="tokens/s",
        ours=medians["job_tokens_per_s"],
        theirs=medians["engine_tokens_per_s"],
        ratios=tuple(row["job_tokens_per_s"] / row["engine_tokens_per_s"] for row in rows),
        goal=0.9,
    )
    return [row]


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-texts", type=int, default=6000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def measure_engine(model: Path, texts: list[str], options: argparse.Namespace) -> float:
    """Return tokens per second of the embedder alone."""
    embedder = EmbedderConfig(model_path=model, dtype=options.dtype).build()
    tokens = TextTokenizer.load(model, embedder.spec.max_tokens).encode(texts)
    embedder.embed(tokens.ids[: tokens.lengths[:8].sum()], tokens.lengths[:8])
    started = time.perf_counter()
    embedder.embed(tokens.ids, tokens.lengths)
    return float(tokens.lengths.sum() / (time.perf_counter() - started))


def measure_job(model: Path, texts: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Return tokens per second of the job while its actor lived, and from start to exit."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        write_corpus(corpus, texts)
        command = [*job_command(corpus, model, options.dtype), f"--output={folder}/out"]
        started = time.perf_counter()
        done = subprocess.run(
            command, env=job_environment(), capture_output=True, text=True, check=True
        )
        elapsed = time.perf_counter() - started
    summary = json.loads(done.stdout.splitlines()[-1])
    actor_s = summary["seconds"]["forward"] + summary["seconds"]["idle"]
    return {
        "job_tokens_per_s": summary["tokens"] / actor_s,
        "whole_tokens_per_s": summary["tokens"] / elapsed,
    }


def print_row(row: dict[str, float]) -> None:
    engine, job, whole = (row[f"{name}_tokens_per_s"] for name in ("engine", "job", "whole"))
    print(f"{engine:14.0f}{job:12.0f}{job / engine:8.2f}{whole:13.0f}{whole / engine:13.2f}")


if __name__ == "__main__":
    main()

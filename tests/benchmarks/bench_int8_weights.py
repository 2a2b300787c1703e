"""What int8 weights save and cost beside the same model in float32.

    python -m tests.benchmarks.bench_int8_weights --threads 1 --cpu-time     # on a busy machine

Both sides embed the same texts in turns; the ratio is the median of the turns. Cosines are those of
each text's two vectors; those of Qwen3, which has random weights here, say little about a real one.
What a text's vector owes to its neighbours is the largest 1 - cosine between the text alone and
in its pack. What a set of questions loses, ``jobs/evaluate.py --weights int8`` tells.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from qbatch.models.embedder import Embedder, EmbedderConfig
from qbatch.models.tokenization import TextTokenizer, TokenBatch
from tests.benchmarks.bench_embed_engine import (
    describe_machine,
    make_qwen3,
    read_texts,
    require,
    seconds,
)
from tests.benchmarks.table import Row

MAX_TOKENS = 512
TEXTS_ALONE = 20


def main(arguments: list[str] | None = None) -> list[Row]:
    """Print a line for each model, and return its row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-texts", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds, not the clock")
    parser.add_argument("--models", nargs="+", default=["qwen3", "minilm"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    texts = read_texts(None, options.num_texts)
    clock = "CPU time" if options.cpu_time else "wall time"
    print(describe_machine(options.threads, len(texts), clock))
    print(
        f"{'':10}{'tokens':>8}{'float32':>9}{'int8':>9}{'ratio':>7}{'cosine mean, min':>18}  pack"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            path = require(name) if name != "qwen3" else Path(folder)
            if name == "qwen3":
                make_qwen3(path, options.layers)
            rows.append(compare(name, path, texts, options))
    return rows


def compare(name: str, path: Path, texts: list[str], options: argparse.Namespace) -> Row:
    """Print the figures of one model as a line, and return its row."""
    exact = EmbedderConfig(model_path=path, dtype="float32").build()
    rounded = EmbedderConfig(model_path=path, weights="int8").build()
    batch = TextTokenizer.load(path, min(MAX_TOKENS, exact.spec.max_tokens)).encode(texts)
    cosines = (embed(exact, batch) * embed(rounded, batch)).sum(axis=1)
    clock = time.process_time if options.cpu_time else time.perf_counter
    turns = [
        (seconds(lambda: embed(rounded, batch), clock), seconds(lambda: embed(exact, batch), clock))
        for _ in range(options.pairs)
    ]
    num_tokens = int(batch.lengths.sum())
    row = Row.of_turns(
        turns,
        num_tokens,
        case=f"documents, {name}, int8 weights",
        against="the same in float32",
        unit="tokens/s",
        goal=1.0,
    )
    print(
        f"{name:10}{num_tokens:8d}{row.theirs:9.0f}{row.ours:9.0f}{row.ratio:7.2f}"
        f"{cosines.mean():10.5f}{cosines.min():8.5f}  {owed_to_neighbours(rounded, batch):.1e}",
        flush=True,
    )
    return row


def embed(embedder: Embedder, batch: TokenBatch) -> np.ndarray:
    return embedder.embed(batch.ids, batch.lengths)


def owed_to_neighbours(embedder: Embedder, batch: TokenBatch) -> float:
    """Return the largest 1 - cosine between a text alone and among all."""
    texts = np.split(batch.ids, np.cumsum(batch.lengths)[:-1])[:TEXTS_ALONE]
    alone = [embedder.embed(ids, np.array([len(ids)], np.int32))[0] for ids in texts]
    together = embed(embedder, batch)[: len(texts)]
    return float((1 - (np.stack(alone) * together).sum(axis=1)).max())


if __name__ == "__main__":
    main()

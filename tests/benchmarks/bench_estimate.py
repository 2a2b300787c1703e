"""What --dry-run foretells beside the run that follows: tokens, seconds and cost, on three corpora.

    python -m tests.benchmarks.bench_estimate --tokens 700000

English and German package descriptions and the short definitions of WordNet, by MiniLM in float32.
The run's seconds go from its first look at the model to the published generation; its cost is that
of the time in which its actor was there, at one unit of money an hour.
"""

import argparse
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qbatch.models.tokenization import TextTokenizer
from qbatch.quickstart.bundled import read_jsonl
from tests.benchmarks.bench_embed_engine import describe_machine, require
from tests.benchmarks.embed_job import job_command, job_environment, write_corpus

PRICE = "1.0"


def descriptions(language: str) -> Iterable[str]:
    rows = read_jsonl(require("debian-descriptions"))
    return (f"{row['synopsis']}\n{row['body']}" for row in rows if row["lang"] == language)


def definitions() -> Iterable[str]:
    rows = read_jsonl(require("wordnet"))
    return (f"{', '.join(row['words'])}: {row['definition']}" for row in rows)


CORPORA: dict[str, Callable[[], Iterable[str]]] = {
    "English descriptions": lambda: descriptions("en"),
    "German descriptions": lambda: descriptions("de"),
    "WordNet definitions": definitions,
}


def main() -> None:
    """Print a row for each corpus."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=700_000, help="of each corpus, about")
    options = parser.parse_args()
    model = require("minilm")
    print(describe_machine(os.cpu_count(), 0))
    print(
        "| corpus | documents | tokens, foretold | tokens | seconds, foretold | seconds | cost, "
        "foretold | cost |\n|---|---|---|---|---|---|---|---|"
    )
    for name, read in CORPORA.items():
        with tempfile.TemporaryDirectory(prefix="qbatch-estimate-") as folder:
            texts = sample(sorted(set(read())), model, options.tokens)
            write_corpus(Path(folder, "corpus"), texts)
            told, made = run(folder, model, "--dry-run"), run(folder, model)
            report = json.loads(Path(folder, "vectors", "report.json").read_text("utf-8"))
        print(
            f"| {name} | {len(texts):,} | {told['tokens_estimated']:,} | {made['tokens']:,} "
            f"| {compared(told['seconds_estimated'], made['seconds']['total'])} "
            f"| {compared(told['cost_estimated'], report['details']['compute']['cost'])} |",
            flush=True,
        )


def compared(told: float, found: float) -> str:
    return f"{told:.4g} ({told / found:.2f} of it) | {found:.4g}"


def sample(texts: list[str], model: Path, num_tokens: int) -> list[str]:
    """Return a seeded sample of about so many tokens."""
    random.Random(0).shuffle(texts)
    mean = TextTokenizer.load(model, 256).encode(texts[:500]).lengths.mean()
    return texts[: int(num_tokens / mean)]


def run(folder: str, model: Path, *flags: str) -> dict[str, Any]:
    """Run the embed job in a process of its own; return its summary."""
    command = job_command(Path(folder, "corpus"), model, "float32", *flags)
    done = subprocess.run(
        [*command, f"--output={folder}/vectors", f"--gpu-hourly-price={PRICE}"],
        env=job_environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()

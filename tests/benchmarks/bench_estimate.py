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
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qbatch.models.tokenization import TextTokenizer
from tests.benchmarks.bench_embed_engine import describe_machine, require

ROOT = Path(__file__).parents[2]
NUM_FILES = 8
PRICE = "1.0"


def descriptions(language: str) -> Iterable[str]:
    for line in require("debian-descriptions").read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["id"].endswith(f":{language}"):
            yield f"{row['synopsis']}\n{row['body']}"


def definitions() -> Iterable[str]:
    for line in require("wordnet").read_text("utf-8").splitlines():
        row = json.loads(line)
        yield f"{', '.join(row['words'])}: {row['definition']}"


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
            num_texts = write_corpus(Path(folder, "corpus"), sorted(set(read())), model, options)
            told, made = run(folder, model, "--dry-run"), run(folder, model)
            report = json.loads(Path(folder, "vectors", "report.json").read_text("utf-8"))
        print(
            f"| {name} | {num_texts:,} | {told['tokens_estimated']:,} | {made['tokens']:,} "
            f"| {compared(told['seconds_estimated'], made['seconds']['total'])} "
            f"| {compared(told['cost_estimated'], report['details']['compute']['cost'])} |",
            flush=True,
        )


def compared(told: float, found: float) -> str:
    return f"{told:.4g} ({told / found:.2f} of it) | {found:.4g}"


def write_corpus(corpus: Path, texts: list[str], model: Path, options: argparse.Namespace) -> int:
    """Write a seeded sample of about so many tokens; return how many texts that are."""
    random.Random(0).shuffle(texts)
    some = texts[:500]
    mean = TextTokenizer.load(model, 256).encode(some).lengths.mean()
    texts = texts[: int(options.tokens / mean)]
    corpus.mkdir()
    for i in range(NUM_FILES):
        rows = [{"doc_id": str(j), "text": texts[j]} for j in range(i, len(texts), NUM_FILES)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (corpus / f"{i}.jsonl").write_text(lines, encoding="utf-8")
    return len(texts)


def run(folder: str, model: Path, *flags: str) -> dict[str, Any]:
    """Run the embed job in a process of its own; return its summary."""
    num_bytes = sum(file.stat().st_size for file in Path(folder, "corpus").iterdir())
    command = [
        *(sys.executable, "jobs/embed_corpus.py", f"--input={folder}/corpus"),
        *(f"--output={folder}/vectors", f"--model={model}", "--dtype=float32"),
        *(f"--unit-bytes={num_bytes // NUM_FILES}", f"--gpu-hourly-price={PRICE}", *flags),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()

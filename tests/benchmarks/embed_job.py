"""The embed job as benchmarks run it: a corpus of JSON lines, and the command that embeds it."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qbatch.pipelines.cluster import KEEP_FREED_MEMORY

ROOT = Path(__file__).parents[2]
NUM_FILES = 8


def write_corpus(corpus: Path, texts: Sequence[str]) -> None:
    """Write the texts to files of about the same size below a new directory."""
    corpus.mkdir()
    rows = [json.dumps({"doc_id": str(i), "text": text}) for i, text in enumerate(texts)]
    for i in range(NUM_FILES):
        (corpus / f"{i}.jsonl").write_text("\n".join(rows[i::NUM_FILES]) + "\n")


def job_command(corpus: Path, model: Path, dtype: str, *flags: str) -> list[str]:
    """Return the command of one actor and as many units as files; ``--output`` is to be added."""
    num_bytes = sum(file.stat().st_size for file in corpus.iterdir())
    return [
        *(sys.executable, str(ROOT / "jobs" / "embed_corpus.py")),
        *(f"--input={corpus}", f"--model={model}", f"--dtype={dtype}", "--max-actors=1"),
        *(f"--unit-bytes={max(1, num_bytes // NUM_FILES)}", *flags),
    ]


def job_environment(**variables: str) -> dict[str, str]:
    """Return the environment of a job, or of a script beside it, that starts a Ray of its own."""
    own = {k: v for k, v in os.environ.items() if k not in KEEP_FREED_MEMORY["env_vars"]}
    return {**own, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local", **variables}

"""Where the bundled texts lie."""

from pathlib import Path

CORPUS = Path(__file__).with_name("corpus.jsonl")
QUERIES = Path(__file__).with_name("queries.jsonl")

"""Where the bundled texts and models lie; the models' README.md are their cards."""

from pathlib import Path

_HERE = Path(__file__).parent

CORPUS = _HERE / "corpus.jsonl"
QUERIES = _HERE / "queries.jsonl"
EMBEDDER = _HERE / "embedder"
RERANKER = _HERE / "reranker"

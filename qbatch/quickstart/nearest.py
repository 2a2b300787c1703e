"""Ask the bundled questions of a vectors table and print the nearest documents.

    python -m qbatch.quickstart.nearest --vectors quickstart-output/vectors --model MODEL_DIR

The search is exact: one matrix product with every vector. The jobs search large tables, with an
index; this is for a person's eyes.
"""

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qbatch.errors import QbatchError
from qbatch.models.embedder import EmbedderConfig
from qbatch.models.hub import resolve_model
from qbatch.models.loading import load_spec
from qbatch.models.prompts import query_prompt
from qbatch.models.tokenization import TextTokenizer
from qbatch.schema import vector_matrix
from qbatch.tables import open_vectors

CORPUS = Path(__file__).with_name("corpus.jsonl")
QUERIES = Path(__file__).with_name("queries.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One document found for a query."""

    doc_id: str
    score: float
    """Cosine of query and passage."""


def nearest(
    vectors_uri: str, model: str, queries: Sequence[str], *, top_k: int = 3
) -> list[list[Hit]]:
    """Return the ``top_k`` best documents of every query, best first.

    Args:
        vectors_uri: A published vectors table that fits in memory.
        model: What the table was embedded with: a directory or a hub id.
        queries: Texts, without instruction.
        top_k: Documents per query; a document counts with its best passage.

    Raises:
        NoInputError: Nothing is published there.
        ConfigError: The model does not load, or has fewer dimensions than the table.
    """
    table = open_vectors(vectors_uri).to_table(columns=["doc_id", "vector"])
    vectors = _unit_rows(vector_matrix(table["vector"]))
    query_vectors = _embed_queries(queries, model, dim=vectors.shape[1])
    doc_ids = table["doc_id"].to_pylist()
    return [_best(doc_ids, scores, top_k) for scores in query_vectors @ vectors.T]


def format_hits(
    queries: Sequence[str],
    hits: Sequence[Sequence[Hit]],
    documents: Mapping[str, Mapping[str, str]],
    *,
    width: int,
) -> str:
    """Return the hits as text: each query, and below it score, title and first words of each hit.

    Args:
        queries: As asked.
        hits: Per query, best first.
        documents: ``title`` and ``text`` by doc_id; ids that are missing show as themselves.
        width: Columns of the terminal.
    """
    blocks = []
    for query, found in zip(queries, hits, strict=True):
        lines = [_format_hit(hit, documents.get(hit.doc_id, {}), width) for hit in found]
        blocks.append("\n".join([query, *lines]))
    return "\n\n".join(blocks)


def _embed_queries(queries: Sequence[str], model: str, *, dim: int) -> np.ndarray:
    spec = load_spec(resolve_model(model))
    prompt = query_prompt(spec.prompts, architecture=spec.architecture)
    tokens = TextTokenizer.load(spec.path).encode([prompt + query for query in queries])
    embedder = EmbedderConfig(model_path=spec.path, dim=dim).build()
    return _unit_rows(embedder.embed(tokens.ids, tokens.lengths))


def _unit_rows(matrix: np.ndarray) -> np.ndarray:
    rows = matrix.astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def _best(doc_ids: Sequence[str], scores: np.ndarray, top_k: int) -> list[Hit]:
    best: dict[str, float] = {}
    for row in np.argsort(-scores, kind="stable").tolist():
        best.setdefault(doc_ids[row], float(scores[row]))
        if len(best) == top_k:
            break
    return [Hit(doc_id=doc_id, score=score) for doc_id, score in best.items()]


def _format_hit(hit: Hit, document: Mapping[str, str], width: int) -> str:
    title = textwrap.shorten(document.get("title") or hit.doc_id, 28, placeholder="...")
    head = f"  {hit.score:5.2f}  {title:28}  "
    words = textwrap.shorten(
        document.get("text", ""), max(width - len(head), 20), placeholder="..."
    )
    return (head + words).rstrip()


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> int:
    """Search the bundled questions and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m qbatch.quickstart.nearest")
    parser.add_argument("--vectors", required=True, help="URI of a published vectors table")
    parser.add_argument("--model", required=True, help="model it was embedded with")
    arguments = parser.parse_args()
    queries = [row["text"] for row in _read_jsonl(QUERIES)]
    documents = {row["doc_id"]: row for row in _read_jsonl(CORPUS)}
    try:
        hits = nearest(arguments.vectors, arguments.model, queries)
    except QbatchError as e:
        print(f"qbatch: {e}", file=sys.stderr)  # noqa: T201 (the command's only output)
        return e.exit_code
    width = shutil.get_terminal_size().columns
    print("\n" + format_hits(queries, hits, documents, width=width))  # noqa: T201 (likewise)
    return 0


if __name__ == "__main__":
    sys.exit(main())

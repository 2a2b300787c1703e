"""Print the answers of a published run to the bundled questions, with titles and first words.

    python -m qbatch.quickstart.answers --run quickstart-output/run

For a person's eyes; programs read the run itself.
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

import pyarrow.compute as pc

from qbatch.errors import QbatchError
from qbatch.tables import open_table

CORPUS = Path(__file__).with_name("corpus.jsonl")
QUERIES = Path(__file__).with_name("queries.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One document found for a query."""

    doc_id: str
    score: float


def read_answers(run_uri: str, *, top_k: int = 3) -> dict[str, list[Hit]]:
    """Return the ``top_k`` best documents of every query of a published run, best first.

    Raises:
        NoInputError: Nothing is published there.
    """
    run = open_table(run_uri).to_table(["query_id", "doc_id", "rank", "score"])
    run = run.filter(pc.field("rank") <= top_k).sort_by(
        [("query_id", "ascending"), ("rank", "ascending")]
    )
    answers: dict[str, list[Hit]] = {}
    for row in run.to_pylist():
        hit = Hit(doc_id=row["doc_id"], score=row["score"])
        answers.setdefault(row["query_id"], []).append(hit)
    return answers


def read_related(table_uri: str, keys: Sequence[str]) -> dict[str, list[Hit]]:
    """Return the items of some keys of published recommendations, best first.

    Raises:
        NoInputError: Nothing is published there.
    """
    related: dict[str, list[Hit]] = {}
    for table in open_table(table_uri).iter_tables():
        for row in table.filter(pc.field("key").isin(list(keys))).to_pylist():
            related[row["key"]] = [Hit(**item) for item in row["items"]]
    return related


def format_answers(
    queries: Mapping[str, str],
    answers: Mapping[str, Sequence[Hit]],
    documents: Mapping[str, Mapping[str, str]],
    *,
    width: int,
) -> str:
    """Return the hits as text: each query, and below it score, title and first words of each hit.

    Args:
        queries: Texts by query_id.
        answers: Hits by query_id, best first.
        documents: ``title`` and ``text`` by doc_id; ids that are missing show as themselves.
        width: Columns of the terminal.
    """
    blocks = []
    for query_id, query in queries.items():
        hits = answers.get(query_id, ())
        lines = [_format_hit(hit, documents.get(hit.doc_id, {}), width) for hit in hits]
        blocks.append("\n".join([query, *lines]))
    return "\n\n".join(blocks)


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
    """Print the answers to the bundled questions."""
    parser = argparse.ArgumentParser(prog="python -m qbatch.quickstart.answers")
    parser.add_argument("--run", required=True, help="URI of a published run")
    arguments = parser.parse_args()
    queries = {row["query_id"]: row["text"] for row in _read_jsonl(QUERIES)}
    documents = {row["doc_id"]: row for row in _read_jsonl(CORPUS)}
    try:
        answers = read_answers(arguments.run)
    except QbatchError as e:
        print(f"qbatch: {e}", file=sys.stderr)  # noqa: T201 (the command's only output)
        return e.exit_code
    width = shutil.get_terminal_size().columns
    print("\n" + format_answers(queries, answers, documents, width=width))  # noqa: T201 (likewise)
    return 0


if __name__ == "__main__":
    sys.exit(main())

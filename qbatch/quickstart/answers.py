"""Print the answers to the bundled questions, retrieved and reranked side by side.

    python -m qbatch.quickstart.answers --run my/run --reranked my/reranked

For a person's eyes; programs read the run itself.
"""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import pyarrow.compute as pc

from qbatch.errors import QbatchError
from qbatch.quickstart.bundled import CORPUS, QUERIES, read_jsonl
from qbatch.tables import open_table

_CELL = 34
"""Columns of one answer."""


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
    retrieved: Mapping[str, Sequence[Hit]],
    reranked: Mapping[str, Sequence[Hit]],
    documents: Mapping[str, Mapping[str, str]],
    *,
    width: int,
) -> str:
    """Return the answers as text: under each query two columns of titles, and the best in words.

    Args:
        queries: Texts by query_id.
        retrieved: Hits by query_id, best first.
        reranked: The same in the order of a reranker.
        documents: ``title`` and ``text`` by doc_id; ids that are missing show as themselves.
        width: Columns of the terminal.
    """
    blocks = []
    for query_id, query in queries.items():
        before, after = retrieved.get(query_id, ()), reranked.get(query_id, ())
        lines = [
            f"  {_cell(left, documents)}  {_cell(right, documents)}".rstrip()
            for left, right in zip_longest(before, after)
        ]
        best = documents.get(after[0].doc_id, {}).get("text", "") if after else ""
        words = textwrap.shorten(best, max(width - 2, 20), placeholder="...")
        blocks.append("\n".join([query, *lines, *([f"  {words}"] if words else [])]))
    head = f"  {'retrieved':{_CELL}}  reranked"
    return "\n\n".join([head, *blocks])


def _cell(hit: Hit | None, documents: Mapping[str, Mapping[str, str]]) -> str:
    if hit is None:
        return " " * _CELL
    title = documents.get(hit.doc_id, {}).get("title") or hit.doc_id
    return f"{hit.score:5.2f}  {textwrap.shorten(title, _CELL - 7, placeholder='...'):{_CELL - 7}}"


def main() -> int:
    """Print the answers to the bundled questions."""
    parser = argparse.ArgumentParser(prog="python -m qbatch.quickstart.answers")
    parser.add_argument("--run", required=True, help="URI of a published run")
    parser.add_argument("--reranked", required=True, help="URI of the same run, reranked")
    arguments = parser.parse_args()
    queries = {row["query_id"]: row["text"] for row in read_jsonl(QUERIES)}
    documents = {row["doc_id"]: row for row in read_jsonl(CORPUS)}
    try:
        retrieved, reranked = read_answers(arguments.run), read_answers(arguments.reranked)
    except QbatchError as e:
        print(f"qbatch: {e}", file=sys.stderr)  # noqa: T201 (the command's only output)
        return e.exit_code
    width = shutil.get_terminal_size().columns
    text = format_answers(queries, retrieved, reranked, documents, width=width)
    print("\n" + text)  # noqa: T201 (likewise)
    return 0


if __name__ == "__main__":
    sys.exit(main())

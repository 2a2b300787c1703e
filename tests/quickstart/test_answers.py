"""What the quickstart prints of a run, and that its questions and judgements fit its corpus."""

import csv
import json

import pyarrow as pa
import pytest

from qbatch.errors import NoInputError
from qbatch.quickstart import bundled
from qbatch.quickstart.answers import Hit, format_answers, read_answers
from qbatch.schema import RUN
from tests.published_tables import publish_tables


@pytest.fixture
def run_uri(tmp_path):
    """A published run; its rows are in no useful order."""
    rows = [("q2", "c", 1, 0.5), ("q1", "b", 2, 0.8), ("q1", "a", 1, 0.9), ("q1", "d", 3, 0.1)]
    table = pa.Table.from_pylist(
        [
            {"query_id": q, "doc_id": d, "passage_id": f"{d}#0", "rank": r, "score": s}
            for q, d, r, s in rows
        ],
        schema=RUN,
    )
    return publish_tables(str(tmp_path), [table]).storage.uri


def test_answers_come_best_first_and_no_more_than_asked(run_uri):
    found = read_answers(run_uri, top_k=2)
    assert {query: [hit.doc_id for hit in hits] for query, hits in found.items()} == {
        "q1": ["a", "b"],
        "q2": ["c"],
    }


def test_answers_say_when_nothing_is_published(tmp_path):
    with pytest.raises(NoInputError, match="no published generation"):
        read_answers(str(tmp_path))


def test_answers_stand_side_by_side_and_fit_the_terminal():
    hits = [Hit(doc_id="a", score=0.5), Hit(doc_id="unknown", score=-0.25)]
    documents = {"a": {"title": "A very long title that goes on and on", "text": "word " * 99}}
    text = format_answers(
        {"q": "why?", "r": "how?"}, {"q": hits}, {"q": [hits[1]]}, documents, width=80
    )
    lines = text.splitlines()
    assert lines[2] == "why?"
    assert [cell.strip() for cell in lines[3].split("  ") if cell.strip()] == [
        *("0.50", "A very long title that..."),
        *("-0.25", "unknown"),
    ]
    assert lines[4] == "  -0.25  unknown"
    assert lines[6] == "how?"
    assert max(map(len, lines)) <= 80
    swapped = format_answers({"q": "why?"}, {}, {"q": hits}, documents, width=80).splitlines()
    assert swapped[-1].startswith("  word word")
    assert swapped[-1].endswith("...")


def test_judgements_name_bundled_questions_and_documents():
    queries = [json.loads(line)["query_id"] for line in bundled.QUERIES.open()]
    documents = {json.loads(line)["doc_id"] for line in bundled.CORPUS.open()}
    qrels = list(csv.DictReader(bundled.QUERIES.with_name("qrels.tsv").open(), delimiter="\t"))
    assert sorted({row["query-id"] for row in qrels}) == sorted(queries)
    assert {row["corpus-id"] for row in qrels} <= documents

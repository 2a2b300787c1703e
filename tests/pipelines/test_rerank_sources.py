"""Candidates in every form: the same pairs come out."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from qbatch.corpus.config import CorpusConfig
from qbatch.errors import BadInputError, SourceChangedError
from qbatch.pipelines.rerank_lists import NestedColumns
from qbatch.pipelines.rerank_sources import (
    CandidateSource,
    candidate_source,
    read_pairs,
    run_source,
)
from qbatch.schema import RUN
from tests.candidate_tables import (
    long_rows,
    make_candidates,
    nested_rows,
    parallel_rows,
    write_lines,
    write_parquet,
    write_run,
)
from tests.published_tables import publish_tables

MADE = make_candidates(num_queries=6, num_candidates=5, num_documents=20)
COLUMNS = NestedColumns(
    query_id="query_id",
    doc_id="doc_id",
    text="text",
    rank="rank",
    score="score",
    documents="documents",
)


def source_of(path: Path, **corpus) -> CandidateSource:
    config = CorpusConfig(input=str(path), **corpus)
    return candidate_source(config, COLUMNS, query_column="query")


def read(source: CandidateSource) -> tuple[list[dict], list[dict]]:
    pairs, rejects = [], []
    for part, size in source.parts():
        assert size > 0
        found, refused, _ = read_pairs(part, source)
        pairs += found.to_pylist()
        rejects += refused.to_pylist()
    return pairs, rejects


def expected() -> set[tuple]:
    return {
        (q, d, rank, pytest.approx(score), MADE.queries[q], MADE.documents[d])
        for q, d, rank, score in MADE.rows
    }


def assert_all(pairs: list[dict]) -> None:
    wanted = {(q, d): (rank, score) for q, d, rank, score in MADE.rows}
    assert len(pairs) == len(wanted)
    for pair in pairs:
        rank, score = wanted.pop((pair["query_id"], pair["doc_id"]))
        assert pair["retrieval_rank"] == rank
        assert pair["retrieval_score"] == pytest.approx(score)
        assert pair["query"] == MADE.queries[pair["query_id"]]
        assert pair["text"] == MADE.documents[pair["doc_id"]]


@pytest.mark.parametrize("rows_of", [long_rows, nested_rows, parallel_rows])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_all_forms_give_the_same_pairs(tmp_path, rows_of, form):
    rows = rows_of(MADE)
    for i in range(2):
        uri = f"{tmp_path}/c/{i}.{form}"
        if form == "jsonl":
            write_lines(uri, rows[i::2])
        else:
            write_parquet(uri, pa.Table.from_pylist(rows[i::2]))
    source = source_of(tmp_path / "c")
    assert source.kind == ("long" if rows_of is long_rows else "nested")
    pairs, rejects = read(source)
    assert rejects == []
    assert_all(pairs)


def test_a_run_names_its_rows_and_has_no_texts(tmp_path):
    source = run_source(write_run(str(tmp_path), MADE)["run"], COLUMNS)
    pairs, _ = read(source)
    assert {(p["query_id"], p["doc_id"], p["retrieval_rank"]) for p in pairs} == {
        (q, d, rank) for q, d, rank, _ in MADE.rows
    }
    assert {(p["query"], p["text"]) for p in pairs} == {(None, None)}
    assert len({(p["object_uri"], p["row"]) for p in pairs}) == len(pairs)


def test_a_published_run_is_read_at_the_generation_asked_for(tmp_path):
    for number, doc_id in enumerate(["old", "new"]):
        row = {"query_id": "q", "doc_id": doc_id, "passage_id": "p", "rank": 1, "score": 0.5}
        table = pa.Table.from_pylist([row], schema=RUN)
        publish_tables(str(tmp_path), [table], after=number)
    for generation, doc_id in {None: "new", 1: "old", 2: "new"}.items():
        pairs, _ = read(run_source(str(tmp_path), COLUMNS, generation))
        assert [pair["doc_id"] for pair in pairs] == [doc_id]


def test_a_run_that_changed_after_planning_is_refused(tmp_path):
    source = run_source(write_run(str(tmp_path), MADE)["run"], COLUMNS)
    parts = list(source.parts())
    write_run(str(tmp_path), replace(MADE, rows=MADE.rows[:9]))
    with pytest.raises(SourceChangedError, match="was replaced or deleted"):
        read_pairs(parts[0][0], source)


def test_bad_items_of_lists_are_rejected_one_by_one(tmp_path):
    documents = [
        {"doc_id": "a", "text": "one"},
        {"doc_id": None, "text": "two"},
        {"doc_id": "c"},
        {"doc_id": "d", "text": " "},
        "no object",
    ]
    rows = [{"query_id": "q", "query": "ask", "documents": documents}]
    write_lines(f"{tmp_path}/a.jsonl", rows)
    pairs, rejects = read(source_of(tmp_path))
    assert [pair["doc_id"] for pair in pairs] == ["a"]
    assert sorted(r["reason"] for r in rejects) == [
        "empty_text",
        "missing_document",
        "missing_document",
        "null_text",
    ]
    assert all(r["detail"].startswith("query 'q': ") for r in rejects)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"documents": "no list"}, "is no list in row 0 of"),
        ({"doc_ids": ["a"], "texts": ["x", "y"]}, "has 1 items, that of texts 2"),
        ({"documents": [{"doc_id": "a", "body": "x"}]}, "'text' and 'doc_id' are needed"),
        (
            {"documents": [{"doc_id": "a", "text": "x", "rank": "first"}]},
            "'rank' of the candidates",
        ),
    ],
)
def test_lists_that_are_none_are_refused(tmp_path, row, message):
    write_lines(f"{tmp_path}/a.jsonl", [{"query_id": "q", "query": "ask", **row}])
    with pytest.raises(BadInputError, match=message):
        read(source_of(tmp_path))


def test_texts_are_cut_before_they_are_tokenized(tmp_path):
    write_lines(f"{tmp_path}/n/a.jsonl", nested_rows(MADE))
    write_lines(f"{tmp_path}/l/a.jsonl", long_rows(MADE))
    for folder in ("n", "l"):
        pairs, _ = read(source_of(tmp_path / folder, max_document_bytes=4))
        assert {len(p["text"]) for p in pairs} | {len(p["query"]) for p in pairs} <= {3, 4}


def test_titles_go_before_texts(tmp_path):
    row = {"query_id": "q", "query": "ask", "doc_id": "d", "title": "T", "text": "body"}
    write_lines(f"{tmp_path}/a.jsonl", [row, row | {"title": None}])
    pairs, _ = read(source_of(tmp_path, title_column="title"))
    assert [pair["text"] for pair in pairs] == ["T body", "body"]

import numpy as np
import pyarrow as pa
import pytest

from qbatch.report.embedding import vectors_details
from qbatch.report.ranking import reranked_details, run_details, side_by_side
from qbatch.report.samples import bins, clip, percentiles_by_rank, sample_rejects, sample_rows
from qbatch.schema import REJECTS, RERANKED, RUN
from tests.published_tables import publish_tables


def reject(row, reason, raw):
    uri = "s3://key:secret@bucket/a.jsonl"
    return {"object_uri": uri, "row": row, "doc_id": None, "reason": reason, "detail": "why"} | {
        "raw": raw
    }


def test_samples_come_from_files_all_over_the_table(store_uri):
    table = publish_tables(
        store_uri, [pa.table({"num_tokens": [i, i], "x": [0, 0]}) for i in range(15)]
    )
    rows = sample_rows(table, ["num_tokens"])
    assert rows.column_names == ["num_tokens"]
    assert rows["num_tokens"].to_pylist() == np.repeat(np.arange(0, 15, 2), 2).tolist()


def test_details_of_vectors_count_tokens_and_show_rejects(store_uri):
    rejects = pa.Table.from_pylist(
        [reject(i, "bad_json", b"\xff{\x00\xe2\x80\xae<b>") for i in range(5)]
        + [reject(None, "corrupt_file", None)],
        schema=REJECTS,
    )
    tokens = pa.table({"num_tokens": pa.array([3, 3, 7, 500], pa.int32())})
    details = vectors_details(publish_tables(store_uri, [tokens], [rejects]))
    assert sum(details["passage_tokens"]["counts"]) == 4
    assert details["passage_tokens"]["counts"][0] == 3
    shown = details["rejected_samples"]
    assert [row["reason"] for row in shown] == ["bad_json"] * 3 + ["corrupt_file"]
    assert shown[0]["raw"] == "\ufffd{\ufffd\ufffd<b>"
    assert shown[0]["object_uri"] == "s3://***@bucket/a.jsonl"
    assert sample_rejects(publish_tables(f"{store_uri}/none", [tokens])) == []


def run_rows(num_queries, depth):
    return [
        {"query_id": f"q{q}", "doc_id": f"d{rank}", "passage_id": "p"}
        | {"rank": rank, "score": 1 - rank / 10}
        for q in range(num_queries)
        for rank in range(1, depth + 1)
    ]


def test_details_of_a_run(store_uri):
    table = pa.Table.from_pylist(run_rows(25, 8), schema=RUN)
    details = run_details(publish_tables(store_uri, [table]))
    assert sum(details["best_scores"]["counts"]) == 25
    assert [point["rank"] for point in details["score_by_rank"]] == list(range(1, 9))
    assert details["score_by_rank"][2]["p50"] == pytest.approx(0.7)
    samples = details["samples"]
    assert len({sample["query"] for sample in samples}) == 10
    assert samples[:2] == [
        {"query": "q0", "rank": 1, "found": "d1", "score": 0.9},
        {"query": "q0", "rank": 2, "found": "d2", "score": 0.8},
    ]


def reranked_rows():
    """Return two queries of ten candidates, whose first two change places."""
    rows = [row | {"log_odds": -row["rank"], "retrieval_score": 0.0} for row in run_rows(2, 10)]
    return [row | {"retrieval_rank": {1: 2, 2: 1}.get(row["rank"], row["rank"])} for row in rows]


def test_details_of_a_reranked_run(store_uri):
    rows = reranked_rows()
    details = reranked_details(
        publish_tables(store_uri, [pa.Table.from_pylist(rows, schema=RERANKED)])
    )
    assert sum(details["scores"]["counts"]) == sum(details["log_odds"]["counts"]) == 20
    assert details["overlap"] == [
        {"depth": 1, "kept": 0.0},
        {"depth": 3, "kept": 1.0},
        {"depth": 5, "kept": 1.0},
    ]
    assert details["rank_after"][0] == {"rank": 1, "p10": 2, "p50": 2, "p90": 2}
    unranked = [row | {"retrieval_rank": None} for row in rows]
    table = pa.Table.from_pylist(unranked, schema=RERANKED)
    assert "overlap" not in reranked_details(publish_tables(f"{store_uri}/none", [table]))


def test_empty_tables_have_details(tmp_path):
    """As of a job that rejected every row."""
    for schema, details in ((RUN, run_details), (RERANKED, reranked_details)):
        for i, tables in enumerate(([], [schema.empty_table()])):
            found = details(publish_tables(str(tmp_path / f"{details.__name__}{i}"), tables))
            assert not any(found.values())
    tokens = pa.table({"num_tokens": pa.array([], pa.int32())})
    for name, tables in {"none": [], "empty": [tokens]}.items():
        found = vectors_details(publish_tables(str(tmp_path / name), tables))
        assert found == {"passage_tokens": None, "rejected_samples": []}


def test_queries_are_shown_before_and_after():
    rows = [row for row in reranked_rows() if row["rank"] <= 2]
    texts = [
        {"query_id": row["query_id"], "doc_id": row["doc_id"]}
        | {"query": f"asks {row['query_id']}", "text": f"text of {row['doc_id']}"}
        for row in rows
    ]
    shown = side_by_side(pa.Table.from_pylist(rows, schema=RERANKED), pa.Table.from_pylist(texts))
    assert shown[0] == {
        "query": "asks q0",
        "rank": 1,
        "retrieved": "text of d2",
        "retrieved_score": pytest.approx(0.8),
        "reranked": "text of d1",
        "reranked_score": pytest.approx(0.9),
    }
    assert [(sample["query"], sample["rank"]) for sample in shown] == [
        ("asks q0", 1), ("asks q0", 2), ("asks q1", 1), ("asks q1", 2)
    ]  # fmt: skip


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("values", [[5], [5, 5], [1, 2, 900], list(range(1000))])
def test_bins_hold_every_value_once(values, whole):
    found = bins(np.array([*values, np.nan, np.inf]), whole=whole)
    assert sum(found["counts"]) == len(values)
    assert len(found["edges"]) == len(found["counts"]) + 1 <= 32
    if whole:
        assert all(edge == int(edge) for edge in found["edges"])


def test_nothing_has_no_bins():
    assert bins(np.array([])) is None


def test_many_ranks_become_few_points():
    ranks = np.tile(np.arange(1, 1001), 3)
    points = percentiles_by_rank(ranks, ranks.astype(float))
    assert len(points) <= 40
    assert (points[0]["rank"], points[-1]["rank"]) == (1, 1000)
    assert all(point["p10"] == point["rank"] for point in points)


def test_long_texts_are_clipped():
    assert clip("a" * 200) == "a" * 200
    assert clip("a" * 201) == "a" * 200 + " ..."

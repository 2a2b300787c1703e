"""A shard's search against a sort of everything that may be found."""

import faiss
import numpy as np
import pyarrow as pa
import pytest

from qbatch.index import searching
from qbatch.index.rescoring import StoredVectors
from qbatch.index.searching import (
    CoarseAssignment,
    SearchOptions,
    ShardSearcher,
    can_share_assignment,
    hits_table,
    merge_hits,
)
from qbatch.index.training import train_template
from tests.vector_tables import clustered

ROWS, DIM, QUERIES = 600, 16, 50
VECTORS = clustered(ROWS, DIM)
ASKED = clustered(QUERIES, DIM, seed=1)


def ids_table(doc_ids) -> pa.Table:
    return pa.table(
        {
            "doc_id": pa.array(doc_ids, pa.large_string()),
            "passage_id": pa.array([f"p{i}" for i in range(len(doc_ids))], pa.large_string()),
        }
    )


def searcher(factory="Flat", doc_ids=None, **options) -> ShardSearcher:
    index = train_template(factory, "l2", VECTORS, seed=0)
    index.add(VECTORS)
    doc_ids = doc_ids or [f"d{i}" for i in range(ROWS)]
    return ShardSearcher(index, ids_table(doc_ids), "l2", **options)


def truth(doc_ids, *, allowed=None, own=None, top_k=5) -> list[list[int]]:
    """Best rows by brute force: one a document, only allowed ones, never the query's own."""
    answers = []
    for query, scores in enumerate(ASKED @ VECTORS.T):
        rows, seen = [], set()
        for row in np.argsort(-scores, kind="stable").tolist():
            document = doc_ids[row]
            if document in seen or (allowed is not None and not allowed[row]):
                continue
            if own is not None and document == own[query]:
                continue
            seen.add(document)
            rows.append(row)
        answers.append(rows[:top_k])
    return answers


PLAIN = [f"d{i}" for i in range(ROWS)]
PASSAGES = [f"d{i // 7}" for i in range(ROWS)]
FEW = np.arange(ROWS) % 40 == 0


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW32"])
@pytest.mark.parametrize("doc_ids", [PLAIN, PASSAGES], ids=["documents", "passages"])
@pytest.mark.parametrize("allowed", [None, FEW], ids=["all", "few"])
@pytest.mark.parametrize("excludes", [False, True])
def test_the_best_allowed_documents_are_found(factory, doc_ids, allowed, excludes):
    own = [doc_ids[t[0]] for t in truth(doc_ids)] if excludes else None
    found = searcher(factory, doc_ids, allowed=allowed).search(
        ASKED,
        SearchOptions(top_k=5, effort=1000 if factory == "HNSW32" else 8),
        own_ids=None if own is None else pa.array(own, pa.large_string()),
    )
    assert found.rows.tolist() == truth(doc_ids, allowed=allowed, own=own)


def test_an_index_that_ignores_filters_gives_the_same(monkeypatch):
    """As GPU code does; also queries are searched deeper until they have enough."""
    options = SearchOptions(top_k=5, effort=8)
    kept = searcher("IVF8,Flat", PASSAGES, allowed=FEW).search(ASKED, options)
    monkeypatch.setattr(searching, "honours_selectors", lambda index: False)
    dropped = searcher("IVF8,Flat", PASSAGES, allowed=FEW).search(ASKED, options)
    np.testing.assert_array_equal(kept.rows, dropped.rows)
    assert dropped.rows.tolist() == truth(PASSAGES, allowed=FEW)


def test_a_filter_that_leaves_little_leaves_places_free():
    allowed = np.arange(ROWS) < 3
    found = searcher(allowed=allowed).search(ASKED, SearchOptions(top_k=5, effort=0))
    assert (np.sort(found.rows, axis=1)[:, :2] == -1).all()
    assert (np.sort(found.rows, axis=1)[:, 2:] == [0, 1, 2]).all()
    nothing = searcher(allowed=allowed & False).search(ASKED, SearchOptions(top_k=5, effort=0))
    assert (nothing.rows == -1).all()


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,SQ8", "IVF8,PQ4x4"])
def test_a_shared_assignment_changes_nothing(factory):
    shard = searcher(factory)
    options = SearchOptions(top_k=5, effort=3)
    assignment = CoarseAssignment(shard.index, ASKED, 3)
    assert can_share_assignment(shard.index)
    alone, shared = (
        shard.search(ASKED, options),
        shard.search(ASKED, options, assignment=assignment),
    )
    np.testing.assert_array_equal(alone.rows, shared.rows)
    np.testing.assert_allclose(alone.scores, shared.scores, atol=1e-6)


def test_kinds_with_a_search_of_their_own_do_not_share():
    for factory in ("Flat", "IVF8,RaBitQ4", "IVF8,PQ4x4fs", "RR16,IVF8,Flat"):
        assert not can_share_assignment(train_template(factory, "l2", VECTORS, seed=0))


def test_rescoring_gives_exact_scores_and_better_order():
    stored = StoredVectors(iter(np.split(VECTORS, [100, 350])), rows=ROWS, dim=DIM)
    coarse = searcher("PQ4x4").search(ASKED, SearchOptions(top_k=5, effort=0))
    exact = searcher("PQ4x4", rescorer=stored).search(
        ASKED, SearchOptions(top_k=5, effort=0, rescore=20)
    )
    scores = np.take_along_axis(ASKED @ VECTORS.T, exact.rows, 1)
    np.testing.assert_allclose(exact.scores, scores, atol=1e-6)
    wanted = truth(PLAIN)

    def recall(found) -> float:
        pairs = zip(found.rows.tolist(), wanted, strict=True)
        return float(np.mean([len(set(a) & set(b)) / 5 for a, b in pairs]))

    assert recall(exact) > recall(coarse) + 0.2


def test_hits_of_shards_merge_to_the_global_best():
    halves = [np.arange(0, 250), np.arange(250, ROWS)]
    tables = []
    for rows in halves:
        index = faiss.IndexFlatL2(DIM)
        index.add(VECTORS[rows])
        shard = ShardSearcher(index, ids_table([PASSAGES[i] for i in rows]), "l2")
        found = shard.search(ASKED, SearchOptions(top_k=5, effort=0))
        tables.append(hits_table(found, shard, int(rows[0])))
    merged = merge_hits(tables, 5)
    lines = zip(*(merged[name].to_pylist() for name in ("query", "rank", "row")), strict=True)
    assert [row for _, _, row in lines] == [row for best in truth(PASSAGES) for row in best]
    assert merged["rank"].to_pylist() == [1, 2, 3, 4, 5] * QUERIES


def test_merging_orders_ties_by_row_and_survives_queries_without_hits():
    def hits(query, row, score, doc_id) -> pa.Table:
        return pa.table(
            {
                "query": pa.array(query, pa.int32()),
                "row": pa.array(row, pa.int64()),
                "score": pa.array(score, pa.float32()),
                "doc_id": pa.array(doc_id, pa.large_string()),
                "passage_id": pa.array(doc_id, pa.large_string()),
            }
        )

    left = hits([0, 0, 2], [7, 1, 3], [0.5, 0.4, 0.1], ["a", "b", "c"])
    right = hits([0, 0], [9, 4], [0.5, 0.5], ["d", "b"])
    merged = merge_hits([left, right], 3)
    assert merged.select(["query", "rank", "row", "doc_id"]).to_pylist() == [
        {"query": 0, "rank": 1, "row": 4, "doc_id": "b"},
        {"query": 0, "rank": 2, "row": 7, "doc_id": "a"},
        {"query": 0, "rank": 3, "row": 9, "doc_id": "d"},
        {"query": 2, "rank": 1, "row": 3, "doc_id": "c"},
    ]
    assert merge_hits([left.slice(0, 0)], 3).num_rows == 0

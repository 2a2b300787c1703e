"""One order of documents: ranks first, then scores, then ids as trec_eval has them."""

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
from hypothesis import given

from qbatch.evaluation.ranking import rank_documents

rows = st.lists(
    st.tuples(
        st.sampled_from(["q1", "q2", "q10", "é"]),
        st.sampled_from(["a", "B", "b", "ä", "10", "9", "z"]),
        st.integers(0, 3),
        st.sampled_from([-1.5, 0.0, 0.25, 3.0]),
    ),
    max_size=40,
)


def run_of(rows, columns=("query_id", "doc_id", "rank", "score")) -> pa.Table:
    types = (pa.large_string(), pa.large_string(), pa.int32(), pa.float32())
    schema = pa.schema(zip(("query_id", "doc_id", "rank", "score"), types, strict=True))
    values = list(zip(*rows, strict=True)) or [()] * 4
    return pa.table(list(values), schema=schema).select(list(columns))


def ranked(run) -> dict[str, list[str]]:
    ranking = rank_documents(run)
    doc_ids = ranking.doc_ids.to_pylist()
    return {
        query_id: doc_ids[ranking.offsets[i] : ranking.offsets[i + 1]]
        for i, query_id in enumerate(ranking.query_ids.to_pylist())
    }


def expected(rows, has_rank: bool) -> dict[str, list[str]]:
    """Python's stable sort, from the last key to the first, and the first place of a document."""
    ordered = sorted(rows, key=lambda row: row[1].encode(), reverse=True)
    ordered.sort(key=lambda row: -row[3])
    if has_rank:
        ordered.sort(key=lambda row: row[2])
    documents: dict[str, dict[str, None]] = {q: {} for q in sorted({r[0] for r in rows})}
    for query_id, doc_id, *_ in ordered:
        documents[query_id].setdefault(doc_id)
    return {query_id: list(found) for query_id, found in documents.items()}


@given(rows)
def test_ranks_decide_then_scores_then_ids(rows):
    assert ranked(run_of(rows)) == expected(rows, has_rank=True)


@given(rows)
def test_without_ranks_scores_decide(rows):
    run = run_of(rows, ("query_id", "doc_id", "score"))
    assert ranked(run) == expected(rows, has_rank=False)


def test_ranks_alone_are_enough():
    run = run_of([("q", "a", 2, 0.0), ("q", "b", 1, 0.0)], ("query_id", "doc_id", "rank"))
    assert ranked(run) == {"q": ["b", "a"]}
    assert rank_documents(run).scores is None


def test_a_document_counts_at_its_best_place_and_the_rest_move_up():
    rows = [("q", "a", 1, 4.0), ("q", "b", 2, 3.0), ("q", "a", 3, 2.0), ("q", "c", 4, 1.0)]
    ranking = rank_documents(run_of(rows))
    assert ranking.doc_ids.to_pylist() == ["a", "b", "c"]
    assert ranking.positions().tolist() == [1, 2, 3]
    assert ranking.scores.to_pylist() == [4.0, 3.0, 1.0]
    assert ranking.num_repeats == 1


def test_scores_that_contradict_ranks_are_counted():
    rows = [("q", "a", 1, 1.0), ("q", "b", 2, 2.0), ("q", "c", 3, 2.0), ("r", "a", 1, 9.0)]
    ranking = rank_documents(run_of(rows))
    assert ranking.num_inversions == 1
    assert ranking.doc_ids.to_pylist() == ["a", "b", "c", "a"]


@given(rows, st.integers(1, 10))
def test_batches_cover_every_query_once_and_stay_small(rows, max_rows):
    ranking = rank_documents(run_of(rows))
    batches = list(ranking.iter_batches(max_rows))
    covered = [query for first, last in batches for query in range(first, last)]
    assert covered == list(range(len(ranking.query_ids)))
    for first, last in batches:
        num_rows = ranking.offsets[last] - ranking.offsets[first]
        assert num_rows <= max_rows or last == first + 1


def test_many_chunks_are_one_run():
    rows = [("q", f"d{i}", i, 0.0) for i in np.random.default_rng(0).permutation(20)]
    run = pa.concat_tables([run_of(rows[:7]), run_of(rows[7:])])
    assert ranked(run) == {"q": [f"d{i}" for i in range(20)]}

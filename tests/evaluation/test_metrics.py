"""Metrics by hand, and beside formulas written out here, scikit-learn and trec_eval's own order."""

import math

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from pytrec_eval import RelevanceEvaluator
from sklearn.metrics import ndcg_score

from qbatch.errors import ConfigError
from qbatch.evaluation import metrics as module
from qbatch.evaluation.metrics import Judgements, parse_metrics, score_queries
from qbatch.evaluation.ranking import rank_documents
from qbatch.schema import QRELS

NAMES = (
    *("ndcg", "ndcg@1", "ndcg@3", "ndcg@100", "map", "map@2", "mrr", "mrr@2", "recall@1"),
    *("recall@3", "recall@1000", "precision@1", "precision@5", "success@1", "success@4"),
)


def run_table(rankings: dict[str, list[str]]) -> pa.Table:
    rows = [
        {"query_id": query_id, "doc_id": doc_id, "rank": rank}
        for query_id, doc_ids in rankings.items()
        for rank, doc_id in enumerate(doc_ids, 1)
    ]
    schema = pa.schema(
        [("query_id", pa.large_string()), ("doc_id", pa.large_string()), ("rank", pa.int32())]
    )
    return pa.Table.from_pylist(rows, schema=schema)


def judgements(qrels: dict[str, dict[str, int]]) -> Judgements:
    rows = [
        {"query_id": query_id, "doc_id": doc_id, "relevance": relevance}
        for query_id, judged in qrels.items()
        for doc_id, relevance in judged.items()
    ]
    return Judgements.from_table(pa.Table.from_pylist(rows, schema=QRELS))


def score(rankings, qrels, *names: str) -> dict[str, dict[str, float]]:
    judged = judgements(qrels)
    parsed = parse_metrics(names)
    values = score_queries(rank_documents(run_table(rankings)), judged, parsed)
    return {
        query_id: dict(zip(map(str, parsed), row, strict=True))
        for query_id, row in zip(judged.by_query, values.tolist(), strict=True)
    }


def by_formula(name: str, doc_ids: list[str], judged: dict[str, int]) -> float:
    """The textbook definition of every metric, without a thought for speed."""
    metric, _, cutoff = name.partition("@")
    k = int(cutoff) if cutoff else len(doc_ids) + len(judged)
    gains = [max(judged.get(doc_id, 0), 0) for doc_id in doc_ids[:k]]
    hits = [gain > 0 for gain in gains]
    ideal = sorted((max(r, 0) for r in judged.values()), reverse=True)
    num_relevant = sum(r > 0 for r in ideal)
    if num_relevant == 0:
        return 0.0

    def dcg(values):
        return sum(v / math.log2(place + 1) for place, v in enumerate(values, 1))

    precisions = [sum(hits[:i]) / i for i, hit in enumerate(hits, 1) if hit]
    return {
        "ndcg": lambda: dcg(gains) / dcg(ideal[:k]),
        "map": lambda: sum(precisions) / num_relevant,
        "mrr": lambda: next((1 / place for place, hit in enumerate(hits, 1) if hit), 0.0),
        "recall": lambda: sum(hits) / num_relevant,
        "precision": lambda: sum(hits) / k,
        "success": lambda: float(any(hits)),
    }[metric]()


def test_by_hand():
    rankings = {"q": ["x", "a", "y", "b", "c"]}
    qrels = {"q": {"a": 3, "b": 1, "d": 2, "y": 0}}
    found = score(rankings, qrels, "ndcg@5", "ndcg@2", "map", "mrr@10", "recall@4", "precision@4")
    dcg, ideal = 3 / math.log2(3) + 1 / math.log2(5), 3 + 2 / math.log2(3) + 1 / 2
    assert found["q"]["ndcg@5"] == pytest.approx(dcg / ideal, abs=1e-12)
    ndcg_at_2 = (3 / math.log2(3)) / (3 + 2 / math.log2(3))
    assert found["q"]["ndcg@2"] == pytest.approx(ndcg_at_2, abs=1e-12)
    assert found["q"]["map"] == pytest.approx((1 / 2 + 2 / 4) / 3, abs=1e-12)
    assert found["q"]["mrr@10"] == 1 / 2
    assert found["q"]["recall@4"] == pytest.approx(2 / 3, abs=1e-12)
    assert found["q"]["precision@4"] == 2 / 4


@pytest.mark.parametrize("cutoff", [1, 2, 3, 7, 49, 1000])
def test_mrr_counts_a_first_hit_at_the_cutoff_and_none_below(cutoff):
    doc_ids = [f"d{i}" for i in range(1, 1003)]
    qrels = {"in": {f"d{cutoff}": 1}, "out": {f"d{cutoff + 1}": 1}}
    found = score({"in": doc_ids, "out": doc_ids}, qrels, f"mrr@{cutoff}")
    assert [found[query][f"mrr@{cutoff}"] for query in ("in", "out")] == [1 / cutoff, 0.0]


documents = st.sampled_from([f"d{i}" for i in range(12)])
rankings = st.dictionaries(
    st.sampled_from(["q1", "q2", "q3", "q4"]), st.lists(documents, unique=True, min_size=1)
)
all_qrels = st.dictionaries(
    st.sampled_from(["q1", "q2", "q3", "q5"]),
    st.dictionaries(documents, st.integers(-2, 4), min_size=1),
    min_size=1,
)


@settings(deadline=None)
@given(rankings, all_qrels)
def test_every_metric_is_its_formula(rankings, qrels):
    found = score(rankings, qrels, *NAMES)
    assert list(found) == sorted(qrels)
    for query_id, judged in qrels.items():
        for name in NAMES:
            wanted = by_formula(name, rankings.get(query_id, []), judged)
            assert found[query_id][name] == pytest.approx(wanted, abs=1e-9), (query_id, name)


def test_ndcg_of_scikit_learn():
    random = np.random.default_rng(1)
    doc_ids = [f"d{i}" for i in range(200)]
    relevance = random.integers(0, 4, (20, 200))
    scores = random.permuted(np.tile(np.arange(200.0), (20, 1)), axis=1)  # without ties
    rankings = {f"q{i:02}": [doc_ids[j] for j in np.argsort(-row)] for i, row in enumerate(scores)}
    qrels = {
        f"q{i:02}": dict(zip(doc_ids, row.tolist(), strict=True)) for i, row in enumerate(relevance)
    }
    for k in (1, 10, 200):
        found = score(rankings, qrels, f"ndcg@{k}")
        for i in range(20):
            wanted = ndcg_score(relevance[i : i + 1], scores[i : i + 1], k=k)
            assert found[f"q{i:02}"][f"ndcg@{k}"] == pytest.approx(wanted, abs=1e-9)


def test_a_run_without_ranks_is_ordered_as_trec_eval_orders_it():
    random = np.random.default_rng(2)
    qrels = {f"q{i}": {f"d{j}": int(random.integers(0, 3)) for j in range(30)} for i in range(50)}
    scores = {q: {f"d{j}": float(random.integers(0, 4)) for j in range(30)} for q in qrels}
    rows = [(q, d, s) for q, found in scores.items() for d, s in found.items()]
    query_ids, doc_ids, values = zip(*rows, strict=True)
    run = pa.table(
        {
            "query_id": pa.array(query_ids, pa.large_string()),
            "doc_id": pa.array(doc_ids, pa.large_string()),
            "score": pa.array(values, pa.float32()),
        }
    )
    judged = judgements(qrels)
    values = score_queries(rank_documents(run), judged, parse_metrics(["map", "ndcg@5"]))
    theirs = RelevanceEvaluator(qrels, {"map", "ndcg_cut.5"}).evaluate(scores)
    wanted = [[theirs[q]["map"], theirs[q]["ndcg_cut_5"]] for q in judged.by_query]
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-12)


def test_queries_without_documents_or_without_relevant_ones_count_as_0():
    qrels = {"absent": {"a": 1}, "hopeless": {"a": 0, "b": -1}, "good": {"a": 1}}
    rankings = {"good": ["a"], "hopeless": ["a", "b"], "not judged": ["a"]}
    found = score(rankings, qrels, *NAMES)
    assert set(found) == set(qrels)
    assert set(found["absent"].values()) == set(found["hopeless"].values()) == {0.0}
    assert found["good"] == {name: 1 / 5 if name == "precision@5" else 1.0 for name in NAMES}
    assert judgements(qrels).num_without_relevant == 1


def test_the_size_of_batches_changes_nothing(monkeypatch):
    random = np.random.default_rng(3)
    doc_ids = [f"d{i}" for i in range(9)]
    rankings = {f"q{i}": random.permutation(doc_ids).tolist() for i in range(30)}
    qrels = {f"q{i}": {doc_ids[i % 9]: 1} for i in range(0, 40, 2)}
    whole = score(rankings, qrels, *NAMES)
    monkeypatch.setattr(module, "_BATCH_ROWS", 10)
    assert score(rankings, qrels, *NAMES) == whole


def test_names_and_aliases():
    parsed = parse_metrics(["nDCG@10", "rr@10", "p@5", "hit_rate@1", "map", "mrr@10"])
    assert [str(m) for m in parsed] == ["ndcg@10", "mrr@10", "precision@5", "success@1", "map"]


@pytest.mark.parametrize(
    "name", ["bleu", "ndcg@0", "ndcg@", "ndcg@-1", "recall", "p", "ndcg@1.5", "", "@3", "map@x"]
)
def test_unknown_metrics_are_refused(name):
    with pytest.raises(ConfigError, match=f"unknown metric '{name}'; use ndcg, mrr"):
        parse_metrics([name])


def test_no_metric_is_refused():
    with pytest.raises(ConfigError, match="no metric is asked for"):
        parse_metrics([])

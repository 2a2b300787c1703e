"""Ranks, ties, fusion and cuts of the last stage, against a loop over queries."""

import numpy as np
import pyarrow as pa
import pytest

from qbatch.errors import BadInputError, IntegrityError
from qbatch.models.rerank_tokens import PairTokenizerSpec
from qbatch.models.tokenization import TokenizerSpec
from qbatch.pipelines.rerank_pairs import PAIRS
from qbatch.pipelines.rerank_task import RerankStage, RerankTask
from qbatch.pipelines.rerank_write import rank_pairs, unit_counts
from qbatch.schema import REJECTS


def task(**settings) -> RerankTask:
    tokenizer = TokenizerSpec(subfolder="", vocab_rows=9, max_tokens=99, appends_end=False)
    stage = RerankStage(
        model="m",
        revision=None,
        spec=PairTokenizerSpec(scorer="cross-encoder", tokenizer=tokenizer),
        max_tokens=99,
        instruction=None,
        tokens=0,
    )
    defaults = {"depth": None, "dtype": "float32", "token_budget": None, "top_k": None}
    defaults |= {"fusion": "none", "fusion_weight": 0.5}
    return RerankTask(output="out", stages=(stage,), **(defaults | settings))


def scored(rows: list[tuple]) -> pa.Table:
    """Rows are (query, document, retrieval rank, retrieval score, log odds)."""
    names = ("query_id", "doc_id", "retrieval_rank", "retrieval_score")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    columns |= {"object_uri": ["o"] * len(rows), "row": list(range(len(rows)))}
    columns["passage_id"] = columns["doc_id"]
    schema = pa.schema([f for f in PAIRS if f.name not in ("query", "text")])
    keys = pa.array([row[4] for row in rows], pa.float32())
    return pa.table(columns, schema=schema).append_column("log_odds", keys)


def random_rows() -> list[tuple]:
    rng = np.random.default_rng(1)
    return [
        (f"q{q}", f"d{d}", int(rank), float(50 - rank), float(rng.integers(-3, 4)))
        for q in range(20)
        for rank, d in enumerate(rng.permutation(30)[: int(rng.integers(1, 12))].tolist(), 1)
    ]


def test_equal_log_odds_go_by_retrieval_rank_then_id():
    rows = [
        ("q", "b", 2, None, 1.0),
        ("q", "a", 2, None, 1.0),
        ("q", "d", None, None, 1.0),
        ("q", "c", 1, None, 1.0),
        ("q", "e", 9, None, 30.0),
        ("q", "f", 8, None, 40.0),
    ]
    ranked, _ = rank_pairs(scored(rows), task())
    assert ranked["doc_id"].to_pylist() == ["f", "e", "c", "a", "b", "d"]
    assert ranked["score"].to_pylist()[0] == 1.0  # saturated, yet 40 stands before 30
    assert ranked["rank"].to_pylist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("top_k", [None, 1, 4])
@pytest.mark.parametrize("fusion", ["none", "rrf", "weighted"])
def test_ranks_are_those_of_a_loop(fusion, top_k):
    rows = random_rows()
    ranked, num_below = rank_pairs(
        scored(rows), task(fusion=fusion, top_k=top_k, fusion_weight=0.3)
    )
    wanted = []
    for query in dict.fromkeys(row[0] for row in rows):
        own = sorted((r for r in rows if r[0] == query), key=lambda r: (-r[4], r[2], r[1]))
        low, high = min(r[3] for r in own), max(r[3] for r in own)
        scores = []
        for place, (_, _, rank, retrieval, key) in enumerate(own, 1):
            sigmoid = 1 / (1 + np.exp(-key))
            scaled = (retrieval - low) / (high - low) if high > low else 1.0
            scores.append(
                {
                    "none": sigmoid,
                    "rrf": 1 / (60 + place) + 1 / (60 + rank),
                    "weighted": 0.3 * sigmoid + 0.7 * scaled,
                }[fusion]
            )
        order = range(len(own))
        if fusion != "none":
            order = sorted(order, key=lambda i, s=scores: (-np.float32(s[i]), i))
        wanted += [
            (query, own[i][1], place, pytest.approx(scores[i], abs=1e-6))
            for place, i in enumerate(order, 1)
        ][:top_k]
    names = ("query_id", "doc_id", "rank", "score")
    assert list(zip(*(ranked[n].to_pylist() for n in names), strict=True)) == wanted
    assert num_below == len(rows) - len(wanted)


def test_fusion_needs_what_it_fuses():
    rows = [("q7", "a", None, None, 1.0)]
    with pytest.raises(BadInputError, match=r"--fusion=rrf needs the retrieval rank .* query 'q7'"):
        rank_pairs(scored(rows), task(fusion="rrf"))
    with pytest.raises(BadInputError, match="--fusion=weighted needs the retrieval score"):
        rank_pairs(scored(rows), task(fusion="weighted"))


def test_a_lost_pair_is_a_typed_error():
    stats = {"pairs_in": 3, "queries": 1, "tokens": 0, "tokens_saved": 0}
    ranked, _ = rank_pairs(scored([("q", "a", 1, 1.0, 1.0)]), task())
    with pytest.raises(IntegrityError, match="3 pairs came in, but 1 were ranked"):
        unit_counts(stats, ranked, REJECTS.empty_table(), {"top_k": 1})

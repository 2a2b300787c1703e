"""The rerank job in this process, against the model asked query by query."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from qbatch.errors import BadInputError, ConfigError, NoInputError
from qbatch.manifest import latest_generation
from qbatch.models.rerank_tokens import CandidateGroup
from qbatch.models.reranker import Reranker, RerankerConfig
from qbatch.pipelines.rerank import RerankCandidatesConfig, rerank_candidates
from qbatch.schema import RERANKED
from qbatch.storage import Storage
from qbatch.tables import open_table
from tests.candidate_tables import (
    Candidates,
    long_rows,
    make_candidates,
    nested_rows,
    write_lines,
    write_run,
)
from tests.completion_server import completion_server
from tests.tiny_models import write_tiny_cross_encoder

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

MADE = make_candidates(num_queries=12, num_candidates=10, num_documents=60)

Hits = dict[str, list[dict]]


@pytest.fixture
def config(tmp_path, tiny_reranker) -> RerankCandidatesConfig:
    flags = write_run(str(tmp_path), MADE)
    return job(f"{tmp_path}/out", tiny_reranker, **flags)


def job(output: str, model: str, **flags) -> RerankCandidatesConfig:
    settings = {"dtype": "float32", "unit_pairs": 30, "num_partitions": 4, **flags}
    return RerankCandidatesConfig(output=output, model=model, **settings)


@cache
def reranker_of(model: str) -> Reranker:
    return RerankerConfig(model_path=Path(model), dtype="float32").build()


def asked(
    model: str, made: Candidates, query_id: str, instruction: str | None = None
) -> dict[str, float]:
    """The oracle: the ranking keys of one query's candidates, asked alone."""
    ids = made.of(query_id)
    documents = [made.documents[d] for d in ids]
    group = CandidateGroup(
        query=made.queries[query_id], documents=documents, instruction=instruction
    )
    (keys,) = reranker_of(model).score([group])
    return dict(zip(ids, keys.tolist(), strict=True))


def hits_of(uri: str) -> Hits:
    """Return the rows of each query, after checking what holds for every reranked run."""
    table = open_table(uri).to_table()
    assert table.schema.equals(RERANKED)
    hits: Hits = {}
    for row in table.to_pylist():
        hits.setdefault(row["query_id"], []).append(row)
    for rows in hits.values():
        assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
        assert len({row["doc_id"] for row in rows}) == len(rows)
        scores = [row["score"] for row in rows]
        assert scores == sorted(scores, reverse=True)
    return hits


def assert_ranked(rows: list[dict], keys: dict[str, float]) -> None:
    """Log-odds are those asked for, and order, ties broken by retrieval rank and id."""
    np.testing.assert_allclose(
        [row["log_odds"] for row in rows], [keys[row["doc_id"]] for row in rows], atol=1e-4
    )
    order = [(-row["log_odds"], row["retrieval_rank"], row["doc_id"]) for row in rows]
    assert order == sorted(order)


def assert_exact(
    uri: str, model: str, made: Candidates = MADE, instruction: str | None = None
) -> Hits:
    hits = hits_of(uri)
    assert hits.keys() == {q for q, _, _, _ in made.rows}
    for query_id, rows in hits.items():
        keys = asked(model, made, query_id, instruction)
        assert sorted(row["doc_id"] for row in rows) == sorted(keys)
        assert_ranked(rows, keys)
    return hits


def test_a_run_is_ranked_as_the_model_ranks_and_a_second_run_makes_nothing(config):
    summary = rerank_candidates(config)
    assert (summary["generation"], summary["queries"], summary["pairs"]) == (1, 12, 120)
    assert (summary["rejected"], summary["dropped"], summary["ranked"]) == ({}, {}, 120)
    assert summary["units_made"] > 4
    assert summary["pairs_per_s"] > 0
    hits = assert_exact(config.output, config.model)
    retrieved = {(q, d): (rank, score) for q, d, rank, score in MADE.rows}
    for row in (row for rows in hits.values() for row in rows):
        rank, score = retrieved[(row["query_id"], row["doc_id"])]
        assert (row["retrieval_rank"], row["retrieval_score"]) == (rank, pytest.approx(score))
        assert row["passage_id"] == row["doc_id"]
        assert row["score"] == pytest.approx(1 / (1 + np.exp(-row["log_odds"])), abs=1e-6)
    report = json.loads(Storage(config.output).read("report.json"))
    details = report.pop("details")
    assert report == summary
    assert 0 < sum(details["scores"]["counts"]) <= summary["ranked"]  # of up to eight files
    shown = [sample["reranked"] for sample in details["samples"]]
    assert shown
    assert set(shown) <= set(MADE.documents.values())
    assert b"Rank movement" in Storage(config.output).read("report.html")
    before = [o.path for o in Storage(config.output).iter_objects()]
    again = rerank_candidates(config)
    assert (again["generation"], again["units_made"]) == (1, 0)
    assert [o.path for o in Storage(config.output).iter_objects()] == before


def test_a_qwen3_over_s3_shares_prefixes(s3_bucket, tiny_judge):
    config = job(f"{s3_bucket}/out", tiny_judge, **write_run(s3_bucket, MADE))
    summary = rerank_candidates(replace(config, instruction="find w1x"))
    assert 0.5 < summary["prefix_share"] < 1
    assert_exact(config.output, tiny_judge, instruction="find w1x")


def test_a_server_scores_what_the_actors_would(tmp_path, tiny_judge):
    """The last of a cascade may be served; a document that the server refuses is rejected alone."""
    small = str(write_tiny_cross_encoder(tmp_path / "small", seed=5))
    flags = write_run(str(tmp_path), MADE)
    local = job(f"{tmp_path}/local", tiny_judge, cascade=(f"{small}:6",), **flags)
    rerank_candidates(local)
    vocab = json.loads(Path(tiny_judge, "tokenizer.json").read_text())["model"]["vocab"]
    with completion_server(tiny_judge, refused=vocab["~"]) as (endpoint, state):
        served = replace(local, output=f"{tmp_path}/served", engine="http", endpoint=endpoint)
        rerank_candidates(served)
        assert state.statuses[200] > 0
        tables = [open_table(config.output) for config in (local, served)]
        assert tables[0].generation.fingerprint == tables[1].generation.fingerprint
        for query_id, rows in hits_of(served.output).items():
            keys = {h["doc_id"]: h["log_odds"] for h in hits_of(local.output)[query_id]}
            assert_ranked(rows, keys)
        rows = [dict(row, text="a ~") if i == 3 else row for i, row in enumerate(long_rows(MADE))]
        write_lines(f"{tmp_path}/c/a.jsonl", rows)
        texts = {"run": None, "queries": None, "corpus": None, "candidates": f"{tmp_path}/c"}
        odd = replace(served, cascade=(), max_bad_fraction=0.1, **texts)
        summary = rerank_candidates(replace(odd, output=f"{tmp_path}/odd"))
    assert summary["rejected"] == {"non_finite_score": 1}


@pytest.mark.slow
def test_a_published_run_is_an_input_and_units_and_parts_change_nothing(config, tmp_path):
    rerank_candidates(config)
    published = open_table(config.output).to_table()
    again = replace(
        config, run=config.output, output=f"{tmp_path}/again", unit_pairs=1000, num_partitions=1
    )
    assert rerank_candidates(again)["pairs"] == 120
    hits = assert_exact(again.output, config.model)
    for row in published.to_pylist():
        found = next(h for h in hits[row["query_id"]] if h["doc_id"] == row["doc_id"])
        assert (found["retrieval_rank"], found["rank"]) == (row["rank"], row["rank"])


@pytest.mark.slow
def test_only_what_is_missing_or_changed_is_made(config):
    first = rerank_candidates(config)
    storage = Storage(config.output)
    whole = open_table(config.output).to_table()
    objects = [o.path for o in storage.iter_objects()]
    data = [path for path in objects if path.startswith("data/")]
    for path in [*data[::3], *(p for p in objects if p.startswith(("manifests/", "join/units/")))]:
        storage.delete(path)
    assert rerank_candidates(config)["units_made"] == len(data[::3])
    assert open_table(config.output).to_table().equals(whole)
    made = replace(MADE, queries=MADE.queries | {"q3": "w1x w2x"})
    queries = [{"query_id": q, "text": t} for q, t in made.queries.items()]
    write_lines(str(config.queries), queries)
    summary = rerank_candidates(config)
    assert (summary["generation"], summary["units_made"]) == (2, 1)
    assert summary["units_reused"] == first["units_made"] - 1
    assert_exact(config.output, config.model, made)


def test_missing_texts_are_rejected_and_too_many_stop_the_job(config, tmp_path):
    extra = [("q0", "gone", 11, 1.0), ("nobody", "d0", 1, 1.0), ("nobody", "gone", 2, 1.0)]
    lines = [f"{q} Q0 {d} {rank} {score} tag" for q, d, rank, score in extra]
    Storage(str(config.run)).write("9.trec", "\n".join(lines).encode())
    with pytest.raises(BadInputError, match=r"3 bad pairs among 123 .*missing_document.: 1"):
        rerank_candidates(config)
    assert latest_generation(Storage(config.output)) is None
    summary = rerank_candidates(replace(config, max_bad_fraction=0.1))
    assert summary["rejected"] == {"missing_document": 1, "missing_query": 2}
    assert (summary["pairs"], summary["ranked"], summary["queries"]) == (123, 120, 13)
    assert summary["units_made"] == 0
    assert_exact(config.output, config.model)
    rejects = open_table(config.output).rejects().to_pylist()
    found = {
        (r["object_uri"].rpartition("/")[2], r["row"], r["doc_id"], r["reason"]) for r in rejects
    }
    assert found == {
        ("9.trec", 0, "gone", "missing_document"),
        ("9.trec", 1, "d0", "missing_query"),
        ("9.trec", 2, "gone", "missing_query"),
    }
    assert any("query 'nobody'" in r["detail"] for r in rejects)


def test_broken_rows_and_queries_too_long_are_rejected(tmp_path, tiny_reranker):
    rows = long_rows(MADE)
    rows[5]["text"] = None
    rows[6]["text"] = " "
    rows[7]["query_id"] = None
    for row in rows[10:20]:
        row["query"] = "x " * 500
    write_lines(f"{tmp_path}/c/a.jsonl", rows)
    with Path(tmp_path, "c", "a.jsonl").open("ab") as file:
        file.write(b"\n{broken")
    config = job(f"{tmp_path}/out", tiny_reranker, candidates=f"{tmp_path}/c", max_bad_fraction=1.0)
    summary = rerank_candidates(config)
    assert summary["rejected"] == {
        "bad_json": 1,
        "empty_text": 1,
        "missing_query": 1,
        "null_text": 1,
        "query_too_long": 10,
    }
    assert (summary["pairs"], summary["ranked"]) == (121, 107)
    hits = hits_of(config.output)
    assert set(MADE.queries) - set(hits) == {"q1"}
    for query_id in ("q2", "q11"):
        assert_ranked(hits[query_id], asked(config.model, MADE, query_id))
    too_long = [
        r
        for r in open_table(config.output).rejects().to_pylist()
        if r["reason"] == "query_too_long"
    ]
    assert {r["doc_id"] for r in too_long} == {row["doc_id"] for row in rows[10:20]}


def test_one_query_with_most_candidates_is_a_unit_of_its_own(tmp_path, tiny_reranker):
    made = make_candidates(num_queries=8, num_candidates=5, num_documents=300)
    made.rows = [row for row in made.rows if row[0] != "q0"]
    made.rows += [("q0", f"d{i}", i + 1, 1.0 / (i + 1)) for i in range(300)]
    config = job(f"{tmp_path}/out", tiny_reranker, **write_run(str(tmp_path), made))
    summary = rerank_candidates(config)
    assert (summary["queries"], summary["pairs"]) == (8, 335)
    assert_exact(config.output, tiny_reranker, made)
    rows = open_table(config.output).generation.files["rows"].to_pylist()
    assert sorted(rows)[-1] == 300
    assert sorted(rows)[-2] <= 30


def test_a_cascade_cuts_by_retrieval_then_by_a_smaller_model(config, tmp_path):
    small = str(write_tiny_cross_encoder(tmp_path / "small", seed=5))
    summary = rerank_candidates(replace(config, cascade=("8", f"{small}:4"), top_k=3))
    assert summary["dropped"] == {"cascade": 12 * 6, "top_k": 12}
    hits = hits_of(config.output)
    assert hits.keys() == set(MADE.queries)
    for query_id, rows in hits.items():
        reached = set(MADE.of(query_id)[:8])
        first = {d: k for d, k in asked(small, MADE, query_id).items() if d in reached}
        through = sorted(first, key=first.get, reverse=True)[:4]
        keys = asked(config.model, MADE, query_id)
        best = sorted(through, key=keys.get, reverse=True)[:3]
        assert [row["doc_id"] for row in rows] == best
        assert_ranked(rows, keys)


def test_a_dry_run_estimates_and_writes_nothing(config, tmp_path):
    plan = rerank_candidates(replace(config, dry_run=True, gpu_hourly_price=2.0, cascade=("5",)))
    assert plan["pairs_estimated"] == pytest.approx(120, rel=0.5)
    assert sum(plan["token_histogram"].values()) > 0
    assert plan["seconds_estimated"] >= 0
    assert plan["tokens_per_s_measured"]
    write_lines(f"{tmp_path}/c/a.jsonl", nested_rows(MADE))
    texts = job(f"{tmp_path}/out", config.model, candidates=f"{tmp_path}/c", tokens_per_s=1e3)
    assert rerank_candidates(replace(texts, dry_run=True))["pairs_estimated"] == 120
    assert list(Storage(config.output).iter_objects()) == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"run": None}, ConfigError, "give exactly one"),
        ({"corpus": None}, ConfigError, "--run needs both"),
        ({"cascade": ("5", "7")}, ConfigError, "holds '7'; give N first"),
        ({"cascade": ("5", "m:7")}, ConfigError, "lets 7 through after 5"),
        ({"fusion_weight": 1.5}, ConfigError, "fusion_weight is 1.5; give 0 to 1"),
        ({"instruction": "find"}, ConfigError, "takes none: 'find'"),
        ({"max_tokens": 4096}, ConfigError, "max_tokens is out of range: 4096"),
        ({"scorer": "yes-no"}, ConfigError, "does not fit the model"),
        ({"model": "no/such-model"}, ConfigError, "No model directory"),
        ({"engine": "http"}, ConfigError, "--engine=http needs --endpoint"),
        ({"engine": "http", "endpoint": "http://x"}, ConfigError, "for a cross-encoder model"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, changes, error, message):
    with pytest.raises(error, match=message):
        rerank_candidates(replace(config, **changes))


def test_inputs_that_cannot_work_are_refused(config, tmp_path, tiny_reranker):
    with pytest.raises(NoInputError, match="there is no run at"):
        rerank_candidates(replace(config, run=f"{tmp_path}/nothing"))
    with pytest.raises(NoInputError, match="no object to read"):
        rerank_candidates(replace(config, corpus=f"{tmp_path}/nothing"))
    rows = [
        {key: row[key] for key in ("query_id", "query", "doc_id", "text")}
        for row in long_rows(MADE)
    ]
    write_lines(f"{tmp_path}/c/a.jsonl", rows)
    bare = job(f"{tmp_path}/bare", tiny_reranker, candidates=f"{tmp_path}/c")
    with pytest.raises(BadInputError, match="--cascade needs the retrieval rank"):
        rerank_candidates(replace(bare, cascade=("5",)))

"""Measuring models on folders in the layout of BEIR, against loops and hand-made rankings."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from qbatch.errors import ConfigError
from qbatch.models.prompts import qwen3_query_prompt
from qbatch.models.rerank_tokens import CandidateGroup
from qbatch.models.reranker import RerankerConfig
from qbatch.pipelines.evaluate import EvaluateConfig, evaluate
from qbatch.pipelines.evaluate_model import search_exactly
from qbatch.storage import Storage
from tests import assets
from tests.pair_tables import embed_one_by_one, random_words, write_json_lines

NUM_DOCUMENTS, NUM_QUERIES = 30, 8


@pytest.fixture(scope="session")
def tiny_qwen3_embedder(tmp_path_factory) -> str:
    """Directory of a random Qwen3 embedder with the real tokenizer."""
    from tests.tiny_models import write_tiny_qwen3_embedder  # noqa: PLC0415 - imports torch

    path = tmp_path_factory.mktemp("tiny-qwen3")
    return str(write_tiny_qwen3_embedder(path, assets.qwen3_tokenizer()))


def write_set(uri: str, seed: int) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Write a BEIR folder; return documents, queries, and the one relevant document of each."""
    rng = np.random.default_rng(seed)
    titles = [random_words(rng, 2) for _ in range(NUM_DOCUMENTS)]
    texts = [random_words(rng, 8) for _ in range(NUM_DOCUMENTS)]
    rows = [
        {"_id": f"d{i}", "title": title, "text": text}
        for i, (title, text) in enumerate(zip(titles, texts, strict=True))
    ]
    write_json_lines(uri, "corpus.jsonl", rows)
    queries = {f"q{i}": random_words(rng, 4) for i in range(NUM_QUERIES)}
    queries["d3"] = random_words(rng, 3)  # an id that a document has too
    queries["unjudged"] = "x"
    write_json_lines(uri, "queries.jsonl", [{"_id": q, "text": t} for q, t in queries.items()])
    relevant = {q: f"d{rng.integers(NUM_DOCUMENTS)}" for q in queries if q != "unjudged"}
    lines = ["query-id\tcorpus-id\tscore", *(f"{q}\t{d}\t1" for q, d in relevant.items())]
    Storage(uri).write("qrels/test.tsv", ("\n".join(lines) + "\n").encode())
    documents = {row["_id"]: f"{row['title']} {row['text']}" for row in rows}
    del queries["unjudged"]
    return documents, queries, relevant


def ndcg(order: list[str], relevant: str) -> float:
    place = order.index(relevant) + 1 if relevant in order[:10] else None
    return 1 / math.log2(place + 1) if place else 0.0


def rankings(model: str, documents: dict, queries: dict, prompt: str = "") -> dict[str, list[str]]:
    vectors = embed_one_by_one(model, list(documents.values()))
    found = {}
    for name, text in queries.items():
        scores = vectors @ embed_one_by_one(model, [prompt + text])[0]
        order = [list(documents)[i] for i in np.argsort(-scores, kind="stable")]
        found[name] = [d for d in order if d != name]
    return found


def test_sets_their_mean_and_files_are_those_of_loops(store_uri, tiny_model, tmp_path):
    made = {name: write_set(f"{store_uri}/{name}", seed) for name, seed in (("a", 0), ("b", 1))}
    config = EvaluateConfig(
        model=tiny_model,
        datasets=tuple(f"{store_uri}/{name}" for name in made),
        metrics=("ndcg@10", "recall@5"),
        dtype="float32",
        output=str(tmp_path / "out"),
    )
    summary = evaluate(config)
    means = []
    for name, (documents, queries, relevant) in made.items():
        orders = rankings(tiny_model, documents, queries)
        wanted = np.mean([ndcg(orders[q], relevant[q]) for q in queries])
        task = summary["tasks"][name]
        assert task["retrieval"]["metrics"]["ndcg@10"] == pytest.approx(wanted)
        recall = np.mean([relevant[q] in orders[q][:5] for q in queries])
        assert task["retrieval"]["metrics"]["recall@5"] == pytest.approx(recall)
        assert (task["queries"], task["documents"]) == (NUM_QUERIES + 1, NUM_DOCUMENTS)
        assert task["prompts"] == {"query": "", "document": ""}
        means.append(wanted)
    assert summary["mean_retrieval"]["ndcg@10"] == pytest.approx(np.mean(means))
    assert "mean_reranking" not in summary
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == summary
    table = pq.read_table(tmp_path / "out" / "tasks.parquet")
    assert table.num_rows == 2 * 2
    assert table.column_names == ["task", "stage", "metric", "value"]


def test_a_reranker_orders_what_was_found(tmp_path, tiny_model, tiny_judge, caplog):
    documents, queries, relevant = write_set(f"{tmp_path}/a", 2)
    config = EvaluateConfig(
        model=tiny_model,
        datasets=(f"{tmp_path}/a",),
        metrics=("ndcg@10",),
        reranker=tiny_judge,
        rerank_depth=7,
        dtype="float32",
    )
    with caplog.at_level("INFO"):
        summary = evaluate(config)
    reranker = RerankerConfig(model_path=Path(tiny_judge), dtype="float32").build()
    values = []
    for name, order in rankings(tiny_model, documents, queries).items():
        texts = [documents[d] for d in order[:7]]
        scores = reranker.score([CandidateGroup(query=queries[name], documents=texts)])[0]
        values.append(ndcg([order[i] for i in np.argsort(-scores)], relevant[name]))
    assert summary["mean_reranking"]["ndcg@10"] == pytest.approx(np.mean(values), abs=1e-6)
    assert summary["mean_reranking"] != summary["mean_retrieval"]
    lines = [line.split() for line in caplog.messages[-1].splitlines()[1:]]
    assert lines[0] == ["task", "stage", "ndcg@10"]
    assert lines[-1][:2] == ["mean", "reranking"]


@pytest.mark.slow
def test_each_set_has_its_instruction_and_it_is_recorded(tmp_path, tiny_qwen3_embedder):
    made = {name: write_set(f"{tmp_path}/{name}", 3) for name in ("a", "b")}
    (tmp_path / "instructions.json").write_text(json.dumps({"b": "Find the answer"}))
    config = EvaluateConfig(
        model=tiny_qwen3_embedder,
        datasets=tuple(f"{tmp_path}/{name}" for name in made),
        metrics=("ndcg@10",),
        instruction="Find it",
        instructions=str(tmp_path / "instructions.json"),
        dtype="float32",
    )
    tasks = evaluate(config)["tasks"]
    for name, instruction in (("a", "Find it"), ("b", "Find the answer")):
        prompt = qwen3_query_prompt(instruction)
        assert tasks[name]["prompts"] == {"query": prompt, "document": ""}
        documents, queries, relevant = made[name]
        orders = rankings(tiny_qwen3_embedder, documents, queries, prompt)
        wanted = np.mean([ndcg(orders[q], relevant[q]) for q in queries])
        assert tasks[name]["retrieval"]["metrics"]["ndcg@10"] == pytest.approx(wanted)
    with pytest.raises(ConfigError, match=r"--instructions name \['b'\], --datasets are \['a'\]"):
        evaluate(replace(config, datasets=(f"{tmp_path}/a",)))


def test_exact_search_keeps_a_thousand_and_leaves_out_the_query_itself():
    rng = np.random.default_rng(0)
    documents = rng.standard_normal((1500, 8)).astype(np.float32)
    queries = documents[:300]
    ids = [f"d{i}" for i in range(1500)]
    table = search_exactly(queries, documents, (ids[:300], ids))
    assert table.num_rows == 300 * 1000
    found = table.filter(np.array(table["query_id"].to_pylist()) == "d299")
    scores = documents @ documents[299]
    wanted = [ids[i] for i in np.argsort(-scores, kind="stable") if i != 299][:1000]
    assert found["doc_id"].to_pylist() == wanted


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "give one of them"),
        ({"run": "r", "model": "m", "qrels": "q"}, "give one of them"),
        ({"run": "r"}, "give both of either"),
        ({"model": "m"}, "give both of either"),
        ({"model": "m", "datasets": ("a",), "rerank_depth": 0}, "rerank_depth is 0"),
    ],
)
def test_bad_settings_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(**flags)

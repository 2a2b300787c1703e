"""The bundled models are small, load everywhere, and answer the bundled questions."""

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from qbatch.evaluation.metrics import Judgements
from qbatch.evaluation.reading import read_qrels
from qbatch.models.rerank_tokens import CandidateGroup
from qbatch.models.reranker import RerankerConfig
from qbatch.quickstart import bundled


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    return {d["doc_id"]: f"{d['title']} {d['text']}" for d in bundled.read_jsonl(bundled.CORPUS)}


@pytest.fixture(scope="module")
def answers() -> dict[str, set[str]]:
    """Return the judged documents of each question."""
    qrels = read_qrels(str(bundled.CORPUS.with_name("qrels.tsv")), "test")
    return {query: set(judged) for query, judged in Judgements.from_table(qrels).by_query.items()}


def test_both_together_take_at_most_40_megabytes():
    files = [path for path in bundled.MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert not [path for path in files if path.name in {"report.json", "complete.json"}]


def test_only_the_embedder_claims_shorter_widths():
    claimed = [
        (bundled.MODELS / k / "config.json").read_text("utf-8") for k in ("embedder", "reranker")
    ]
    assert ["matryoshka_dimensions" in text for text in claimed] == [True, False]


def test_most_questions_find_an_answer_among_the_first_three(documents, answers):
    """By sentence-transformers, so the files mean to others what they mean to us."""
    model = SentenceTransformer(str(bundled.MODELS / "embedder"), device="cpu")
    names = list(documents)
    queries = bundled.read_jsonl(bundled.QUERIES)
    vectors = model.encode(list(documents.values()), normalize_embeddings=True)
    asked = model.encode([q["text"] for q in queries], "query", normalize_embeddings=True)
    best = np.argsort(-asked @ vectors.T, axis=1)[:, :3]
    hits = [
        bool({names[i] for i in row} & answers[q["query_id"]])
        for q, row in zip(queries, best, strict=True)
    ]
    assert len(hits) == len(answers) == 14
    assert sum(hits) >= 10


def test_the_reranker_tells_answers_from_documents_at_random(documents, answers):
    reranker = RerankerConfig(model_path=bundled.MODELS / "reranker").build()
    names = list(documents)
    right = 0
    for number, query in enumerate(bundled.read_jsonl(bundled.QUERIES)):
        answer = min(answers[query["query_id"]])
        others = [names[(97 * number + 7 * i) % len(names)] for i in range(10)]
        texts = [documents[name] for name in (answer, *others)]
        (scores,) = reranker.score([CandidateGroup(query=query["text"], documents=texts)])
        right += int(np.argmax(scores) == 0)
    assert right >= 11

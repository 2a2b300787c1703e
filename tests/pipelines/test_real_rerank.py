"""Real weights on real questions: retrieval by MiniLM, reranked by small language models."""

import json
import random
from pathlib import Path

import pytest

from qbatch.pipelines.build_index import BuildIndexConfig, build_index
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus
from qbatch.pipelines.evaluate import EvaluateConfig, evaluate
from qbatch.pipelines.rerank import RerankCandidatesConfig, rerank_candidates
from qbatch.pipelines.search_index import SearchIndexConfig, search_index
from qbatch.tables import open_table
from tests import assets
from tests.candidate_tables import write_lines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("ray_cluster"),
]

NUM_QUESTIONS, TOP_K, ANSWER_CHARACTERS = 40, 10, 600


@pytest.fixture(scope="module")
def searched(ray_cluster, tmp_path_factory) -> Path:
    """All answers of the Perl FAQ as documents, and some questions searched in them by MiniLM."""
    folder = tmp_path_factory.mktemp("perlfaq")
    lines = assets.perlfaq().read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    asked = random.Random(0).sample(rows, NUM_QUESTIONS)
    answers = [{"doc_id": row["id"], "text": row["answer"][:ANSWER_CHARACTERS]} for row in rows]
    write_lines(f"{folder}/answers.jsonl", answers)
    questions = [{"query_id": row["id"], "text": row["question"]} for row in asked]
    write_lines(f"{folder}/questions.jsonl", questions)
    qrels = "".join(f"{row['id']} 0 {row['id']} 1\n" for row in asked)
    Path(folder, "qrels.tsv").write_text(qrels)
    embed_corpus(
        EmbedCorpusConfig(
            input=f"{folder}/answers.jsonl",
            output=f"{folder}/vectors",
            model=str(assets.minilm()),
            dtype="float32",
        )
    )
    build_index(
        BuildIndexConfig(vectors=f"{folder}/vectors", output=f"{folder}/index", factory="Flat")
    )
    search_index(
        SearchIndexConfig(
            index=f"{folder}/index",
            queries=f"{folder}/questions.jsonl",
            output=f"{folder}/run",
            top_k=TOP_K,
        )
    )
    return folder


def reranked(folder: Path, model: Path, **settings: object) -> str:
    output = f"{folder}/{model.name}"
    rerank_candidates(
        RerankCandidatesConfig(
            run=f"{folder}/run",
            queries=f"{folder}/questions.jsonl",
            corpus=f"{folder}/answers.jsonl",
            output=output,
            model=str(model),
            dtype="float32",
            **settings,
        )
    )
    return output


def ndcg(folder: Path, run: str) -> float:
    config = EvaluateConfig(run=run, qrels=f"{folder}/qrels.tsv")
    return evaluate(config)["metrics"]["ndcg@10"]


def test_query_likelihood_lifts_the_first_stage(searched, capsys):
    model = assets.smollm2()
    output = reranked(searched, model, scorer="query-likelihood", max_tokens=224)
    before, after = ndcg(searched, f"{searched}/run"), ndcg(searched, output)
    with capsys.disabled():
        print(f"\n{NUM_QUESTIONS} questions, nDCG@10: MiniLM {before:.3f}, SmolLM2 {after:.3f}")
    assert after > before


def test_yes_and_no_of_a_real_model(searched, capsys):
    """Zero-shot, a small model judges weakly; but the answer gets more of a yes than the rest."""
    model = assets.qwen25_coder()
    output = reranked(searched, model, scorer="yes-no", max_tokens=224, cascade=("3",))
    rows = open_table(output).to_table().to_pylist()
    own = [row["log_odds"] for row in rows if row["doc_id"] == row["query_id"]]
    others = [row["log_odds"] for row in rows if row["doc_id"] != row["query_id"]]
    assert len(rows) == NUM_QUESTIONS * 3
    assert all(0 < row["score"] < 1 for row in rows)
    mean, mean_others = sum(own) / len(own), sum(others) / len(others)
    with capsys.disabled():
        print(f"\nlog-odds of yes: own answers {mean:.2f}, other answers {mean_others:.2f}")
    assert mean > mean_others

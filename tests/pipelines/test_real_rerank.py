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
from qbatch.quickstart.training_texts import is_held_out
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
NUM_PACKAGES, NUM_SYNOPSES, BODY_CHARACTERS = 1500, 60, 400


def search_first(folder: Path, documents: dict[str, str], questions: dict[str, str]) -> Path:
    """Search questions in documents by MiniLM; the document of a question has its id."""
    rows = [{"doc_id": doc_id, "text": text} for doc_id, text in documents.items()]
    write_lines(f"{folder}/answers.jsonl", rows)
    rows = [{"query_id": query_id, "text": text} for query_id, text in questions.items()]
    write_lines(f"{folder}/questions.jsonl", rows)
    Path(folder, "qrels.tsv").write_text("".join(f"{q} 0 {q} 1\n" for q in questions))
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


@pytest.fixture(scope="module")
def answers_searched(ray_cluster, tmp_path_factory) -> Path:
    """All answers of the Perl FAQ as documents, and some of its questions."""
    lines = assets.perlfaq().read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    asked = random.Random(0).sample(rows, NUM_QUESTIONS)
    return search_first(
        tmp_path_factory.mktemp("perlfaq"),
        {row["id"]: row["answer"][:ANSWER_CHARACTERS] for row in rows},
        {row["id"]: row["question"] for row in asked},
    )


@pytest.fixture(scope="module")
def packages_searched(ray_cluster, tmp_path_factory) -> Path:
    """Descriptions of packages that no model of ours trains on, and the synopses of some."""
    synopses, bodies = {}, {}
    for line in assets.debian_descriptions().open(encoding="utf-8"):
        row = json.loads(line)
        name = row["id"].partition(":")[0]
        if row["lang"] == "en" and len(row["body"]) > 100 and is_held_out(name):
            synopses[name], bodies[name] = row["synopsis"], row["body"][:BODY_CHARACTERS]
    names = random.Random(0).sample(sorted(bodies), NUM_PACKAGES)
    return search_first(
        tmp_path_factory.mktemp("packages"),
        {name: bodies[name] for name in names},
        {name: synopses[name] for name in names[:NUM_SYNOPSES]},
    )


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


def test_query_likelihood_lifts_the_first_stage(packages_searched, capsys):
    folder, model = packages_searched, assets.smollm2()
    output = reranked(folder, model, scorer="query-likelihood", max_tokens=224)
    before, after = ndcg(folder, f"{folder}/run"), ndcg(folder, output)
    with capsys.disabled():
        print(f"\n{NUM_SYNOPSES} synopses, nDCG@10: MiniLM {before:.3f}, SmolLM2 {after:.3f}")
    assert after > before


def test_yes_and_no_of_a_real_model(answers_searched, capsys):
    """Zero-shot, a small model judges weakly; but the answer gets more of a yes than the rest."""
    model = assets.qwen25_coder()
    output = reranked(answers_searched, model, scorer="yes-no", max_tokens=224, cascade=("3",))
    rows = open_table(output).to_table().to_pylist()
    own = [row["log_odds"] for row in rows if row["doc_id"] == row["query_id"]]
    others = [row["log_odds"] for row in rows if row["doc_id"] != row["query_id"]]
    assert len(rows) == NUM_QUESTIONS * 3
    assert all(0 < row["score"] < 1 for row in rows)
    mean, mean_others = sum(own) / len(own), sum(others) / len(others)
    with capsys.disabled():
        print(f"\nlog-odds of yes: own answers {mean:.2f}, other answers {mean_others:.2f}")
    assert mean > mean_others

"""Models of ``make bundled-models`` beside BM25 and MiniLM on held-out package descriptions.

    python -m tests.benchmarks.bundled_quality --sets bundled-models/texts/evaluation \\
        --embedder bundled-models/embedder --reranker bundled-models/reranker

The sets are those of ``qbatch.quickstart.training_texts``: 300 synopses, English and German, each
to find its description among 1,500 English ones. Nothing of these packages was trained on.
"""

import argparse
from pathlib import Path

import bm25s
import pyarrow as pa

from qbatch.evaluation.metrics import Judgements, parse_metrics, score_queries
from qbatch.evaluation.ranking import rank_documents
from qbatch.evaluation.reading import read_qrels
from qbatch.pipelines.evaluate_model import ModelsUnderTest, measure_models, read_texts
from tests.benchmarks.bench_embed_engine import require

SETS = ("english", "german")
METRICS = parse_metrics(("ndcg@10", "recall@1", "mrr@10"))
RERANK_DEPTH = 50


def main() -> None:
    """Print a line for each model and set."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", type=Path, required=True)
    parser.add_argument("--embedder", type=Path, required=True)
    parser.add_argument("--reranker", type=Path)
    parser.add_argument("--dims", type=int, nargs="*", default=[])
    options = parser.parse_args()
    print(f"{'':34}" + "".join(f"{name} {metric!s:10}" for name in SETS for metric in METRICS))
    show("BM25", {name: bm25(options.sets / name) for name in SETS})
    show("MiniLM", retrieval(measured(options.sets, require("minilm"))))
    found = measured(options.sets, options.embedder, options.reranker)
    show("embedder", retrieval(found))
    for dim in options.dims:
        own = retrieval(measured(options.sets, options.embedder, dim=dim))
        show(f"embedder, first {dim} components", own)
    if options.reranker is not None:
        show(f"its best {RERANK_DEPTH}, reranked", reranking(found))


def show(name: str, metrics: dict[str, dict[str, float]]) -> None:
    figures = (f"{metrics[task][str(m)]:<{len(task) + 11}.3f}" for task in SETS for m in METRICS)
    print(f"{name:34}" + "".join(figures), flush=True)


def measured(
    sets: Path, model: Path, reranker: Path | None = None, *, dim: int | None = None
) -> dict:
    under_test = ModelsUnderTest(
        datasets=[str(sets / name) for name in SETS],
        model=str(model),
        revision=None,
        dim=dim,
        reranker=None if reranker is None else str(reranker),
        reranker_revision=None,
        rerank_depth=RERANK_DEPTH,
        instruction=None,
        instructions={},
        dtype="float32",
        split="test",
    )
    return measure_models(under_test, METRICS)["tasks"]


def retrieval(tasks: dict) -> dict[str, dict[str, float]]:
    return {name: tasks[name]["retrieval"]["metrics"] for name in SETS}


def reranking(tasks: dict) -> dict[str, dict[str, float]]:
    return {name: tasks[name]["reranking"]["metrics"] for name in SETS}


def bm25(folder: Path) -> dict[str, float]:
    """Return the metrics of BM25 as bm25s computes it by default, English stop words left out."""
    documents, queries = read_texts(str(folder)), read_texts(str(folder / "queries.jsonl"))
    index = bm25s.BM25()
    index.index(bm25s.tokenize(documents.texts, show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(queries.texts, show_progress=False)
    places, scores = index.retrieve(tokens, k=100, show_progress=False)
    run = pa.table(
        {
            "query_id": [name for name in queries.ids for _ in range(100)],
            "doc_id": [documents.ids[i] for i in places.ravel()],
            "score": scores.ravel(),
        }
    )
    judgements = Judgements.from_table(read_qrels(str(folder), "test"))
    values = score_queries(rank_documents(run), judgements, METRICS).mean(axis=0)
    return dict(zip(map(str, METRICS), values.tolist(), strict=True))


if __name__ == "__main__":
    main()

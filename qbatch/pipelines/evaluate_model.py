"""Measuring an embedder, and a reranker on what it finds, on small evaluation sets.

Each set is a folder in the layout of BEIR, the user's own or one of MTEB's. Search is exact and in
this process, so that figures depend on the models alone; for large corpora embed, index, search and
evaluate the run.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.listing import resolve_config
from qbatch.corpus.reading import read_unit
from qbatch.corpus.units import plan_units
from qbatch.errors import ConfigError
from qbatch.evaluation.metrics import Judgements, Metric, score_queries
from qbatch.evaluation.ranking import rank_documents
from qbatch.evaluation.reading import read_qrels
from qbatch.models.embedder import Embedder, EmbedderConfig
from qbatch.models.hub import resolve_model
from qbatch.models.prompts import document_prompt, query_prompt
from qbatch.models.rerank_tokens import CandidateGroup
from qbatch.models.reranker import Reranker, RerankerConfig
from qbatch.models.tokenization import TextTokenizer
from qbatch.pipelines.evaluation_queries import queries_of
from qbatch.pipelines.evaluation_sets import EvaluationSet, resolve_set
from qbatch.pipelines.rerank_sources import full_texts
from qbatch.schema import ComputeDtype, Weights
from qbatch.storage import read_object

log = logging.getLogger(__name__)

_TOP_K = 1000
_TEXTS_PER_CALL = 4096
_QUERIES_PER_CALL = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelsUnderTest:
    """What is measured, on what, and how it is asked."""

    datasets: Sequence[str]
    model: str
    revision: str | None
    dim: int | None
    reranker: str | None
    reranker_revision: str | None
    rerank_depth: int
    instruction: str | None
    """Of sets that ``instructions`` does not name; None is the model's own."""
    instructions: Mapping[str, str]
    """By name of the set."""
    dtype: Literal["auto"] | ComputeDtype
    split: str
    weights: Weights = "float"
    """Of the embedder; int8 computes in float32, whatever the reranker's dtype is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Texts:
    """Ids and texts, side by side."""

    ids: list[str]
    texts: list[str]


def read_instructions(uri: str | None) -> dict[str, str]:
    """Return the instruction of each set from a JSON object, by name of the set.

    Raises:
        ConfigError: The file is something else.
    """
    if uri is None:
        return {}
    try:
        found = json.loads(read_object(uri))
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(
            f"cannot read --instructions={uri}: {error}. Give a JSON object"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ConfigError(f"--instructions={uri} is no object of texts; give names and sentences")
    return found


def measure_models(under_test: ModelsUnderTest, metrics: Sequence[Metric]) -> dict[str, Any]:
    """Return the metrics of every set and their means over the sets.

    Raises:
        ConfigError: A model cannot be loaded, or takes no instruction although one is given.
        NoInputError: A set is not there.
    """
    sets = [resolve_set(given) for given in under_test.datasets]
    names = [found.name for found in sets]
    if len(set(names)) < len(names):
        raise ConfigError(f"--datasets name a set twice: {names}; give folders of different names")
    unknown = sorted(set(under_test.instructions) - set(names))
    if unknown:
        raise ConfigError(f"--instructions name {unknown}, --datasets are {names}; remove them")
    model = _EmbeddingModel(under_test)
    reranker = None
    if under_test.reranker is not None:
        path = resolve_model(under_test.reranker, under_test.reranker_revision)
        reranker = RerankerConfig(model_path=path, dtype=under_test.dtype).build()
    tasks = {
        found.name: _measure_task(found, under_test, (model, reranker), metrics) for found in sets
    }
    return {"model": under_test.model, "reranker": under_test.reranker, "tasks": tasks} | {
        f"mean_{stage}": _mean([task[stage]["metrics"] for task in tasks.values()])
        for stage in ("retrieval", "reranking")
        if all(stage in task for task in tasks.values())
    }


def _mean(tasks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([task[name] for task in tasks])) for name in tasks[0]}


def _measure_task(
    task: EvaluationSet,
    under_test: ModelsUnderTest,
    models: tuple["_EmbeddingModel", Reranker | None],
    metrics: Sequence[Metric],
) -> dict[str, Any]:
    started = time.perf_counter()
    model, reranker = models
    judgements = Judgements.from_table(read_qrels(task.uri, under_test.split))
    documents = read_texts(task.uri)
    queries = _judged(read_texts(queries_of(task.uri)), judgements, task.uri)
    instruction = under_test.instructions.get(task.name, under_test.instruction)
    prompts = model.prompts(instruction)
    found = search_exactly(
        model.embed(queries.texts, prompts["query"]),
        model.embed(documents.texts, prompts["document"]),
        (queries.ids, documents.ids),
    )
    result: dict[str, Any] = {
        "revision": task.revision,
        "queries": len(judgements.by_query),
        "documents": len(documents.ids),
        "prompts": prompts,
        "retrieval": _figures(found, judgements, metrics),
    }
    if reranker is not None:
        own = instruction if reranker.spec.scorer == "yes-no" else None
        again = _rerank(
            reranker, found, (queries, documents), depth=under_test.rerank_depth, instruction=own
        )
        result["reranking"] = _figures(again, judgements, metrics) | {"instruction": own}
    log.info("%s: %d queries, %.1f s", task.name, result["queries"], time.perf_counter() - started)
    return result


def _figures(
    run: pa.Table, judgements: Judgements, metrics: Sequence[Metric]
) -> dict[str, dict[str, float]]:
    values = score_queries(rank_documents(run), judgements, metrics)
    names = map(str, metrics)
    return {"metrics": dict(zip(names, values.mean(axis=0).tolist(), strict=True))}


def read_texts(uri: str) -> _Texts:
    """Return the documents of a set, or its queries; a title goes before the text."""
    config = CorpusConfig(input=uri)
    if uri.rpartition("/")[2].startswith("queries."):
        config = replace(config, id_column="_id")
    config = resolve_config(config)
    tables = [read_unit(unit, config).documents for unit in plan_units(config)]
    return _Texts(
        ids=[i for table in tables for i in table["doc_id"].to_pylist()],
        texts=[text for table in tables for text in full_texts(table).to_pylist()],
    )


def _judged(queries: _Texts, judgements: Judgements, uri: str) -> _Texts:
    rows = [i for i, name in enumerate(queries.ids) if name in judgements.by_query]
    if not rows:
        raise ConfigError(
            f"no query of {uri} is judged: the queries have {queries.ids[:1]}, the judgements "
            f"{list(judgements.by_query)[:1]}. Check --split and the ids"
        )
    return _Texts(ids=[queries.ids[i] for i in rows], texts=[queries.texts[i] for i in rows])


class _EmbeddingModel:
    """An embedder with its tokenizer and prompts."""

    def __init__(self, under_test: ModelsUnderTest) -> None:
        path = resolve_model(under_test.model, under_test.revision)
        config = EmbedderConfig(
            model_path=path,
            dtype=under_test.dtype,
            weights=under_test.weights,
            dim=under_test.dim,
        )
        self._embedder: Embedder = config.build()
        self._tokenizer = TextTokenizer.load(path)

    def prompts(self, instruction: str | None) -> dict[str, str]:
        """Return the exact strings before queries and documents."""
        spec = self._embedder.spec
        query = query_prompt(spec.prompts, architecture=spec.architecture, instruction=instruction)
        return {"query": query, "document": document_prompt(spec.prompts)}

    def embed(self, texts: Sequence[str], prompt: str) -> np.ndarray:
        """Return float32 vectors; texts longer than the model takes lose their end."""
        found = [np.empty((0, self._embedder.dim), np.float32)]
        for start in range(0, len(texts), _TEXTS_PER_CALL):
            part = [prompt + text for text in texts[start : start + _TEXTS_PER_CALL]]
            tokens = self._tokenizer.encode(part)
            found.append(self._embedder.embed(tokens.ids, tokens.lengths))
        return np.concatenate(found)


def search_exactly(
    queries: np.ndarray, documents: np.ndarray, ids: tuple[Sequence[str], Sequence[str]]
) -> pa.Table:
    """Return ``query_id``, ``doc_id`` and ``score`` of the best 1,000 documents of each query.

    A document whose id is the query's is left out, as BEIR does: there a query can be a document.

    Args:
        queries: float32, (queries, dim).
        documents: float32, (documents, dim).
        ids: Of queries and of documents.
    """
    query_ids, doc_ids = ids
    columns: list[tuple[list[str], list[str], np.ndarray]] = []
    for first, scores in _scores(queries, documents):
        best = np.argsort(-scores, axis=1, kind="stable")[:, : _TOP_K + 1]
        for row, places in enumerate(best):
            name = query_ids[first + row]
            kept = [i for i in places.tolist() if doc_ids[i] != name][:_TOP_K]
            columns.append(([name] * len(kept), [doc_ids[i] for i in kept], scores[row, kept]))
    names, found, values = zip(*columns, strict=True)
    return pa.table(
        {
            "query_id": pa.array([n for own in names for n in own], pa.large_string()),
            "doc_id": pa.array([d for own in found for d in own], pa.large_string()),
            "score": np.concatenate(values),
        }
    )


def _scores(queries: np.ndarray, documents: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for first in range(0, len(queries), _QUERIES_PER_CALL):
        yield first, queries[first : first + _QUERIES_PER_CALL] @ documents.T


def _rerank(
    reranker: Reranker,
    run: pa.Table,
    texts: tuple[_Texts, _Texts],
    *,
    depth: int,
    instruction: str | None,
) -> pa.Table:
    """Return the first ``depth`` documents of each query in the order of the reranker."""
    queries, documents = (dict(zip(t.ids, t.texts, strict=True)) for t in texts)
    by_query: dict[str, list[str]] = {}
    for query_id, doc_id in zip(
        run["query_id"].to_pylist(), run["doc_id"].to_pylist(), strict=True
    ):
        own = by_query.setdefault(query_id, [])
        if len(own) < depth:
            own.append(doc_id)
    groups = [
        CandidateGroup(
            query=queries[name],
            documents=[documents[doc_id] for doc_id in own],
            instruction=instruction,
        )
        for name, own in by_query.items()
    ]
    keys = np.concatenate(reranker.score(groups))
    # NaN is what a query too long for the model gets: its documents count as last.
    return pa.table(
        {
            "query_id": pa.array(
                [name for name, own in by_query.items() for _ in own], pa.large_string()
            ),
            "doc_id": pa.array([d for own in by_query.values() for d in own], pa.large_string()),
            "score": np.where(np.isfinite(keys), keys, -np.inf).astype(np.float32),
        }
    )


def format_tasks(summary: Mapping[str, Any]) -> str:
    """Return the metrics of a summary as lines for a person: a row a set, then the mean."""
    stages = [stage for stage in ("retrieval", "reranking") if f"mean_{stage}" in summary]
    names = list(summary["mean_retrieval"])
    rows = [("task", "stage", *names)]
    for stage in stages:
        for task, found in summary["tasks"].items():
            rows.append((task, stage, *(f"{found[stage]['metrics'][n]:.4f}" for n in names)))
        rows.append(("mean", stage, *(f"{summary[f'mean_{stage}'][n]:.4f}" for n in names)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def tasks_table(summary: Mapping[str, Any]) -> pa.Table:
    """Return ``task``, ``stage``, ``metric`` and ``value`` of a summary, means left out."""
    rows = [
        {"task": task, "stage": stage, "metric": metric, "value": value}
        for task, found in summary["tasks"].items()
        for stage in ("retrieval", "reranking")
        if stage in found
        for metric, value in found[stage]["metrics"].items()
    ]
    names = ["task", "stage", "metric"]
    return pa.Table.from_pylist(
        rows, schema=pa.schema([*((n, pa.string()) for n in names), ("value", pa.float64())])
    )

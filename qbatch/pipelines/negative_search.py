"""The first half of mining: the pairs' queries search the index, and positives get their scores.

Query vectors become a published vectors table of their own, ``<output>/query-vectors``: a row a
pair, beside the score of its positive and the keys by which positives are known again.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from qbatch.corpus.spans import Unit
from qbatch.errors import IntegrityError
from qbatch.index.columns import check_same_space, weights_of
from qbatch.manifest import fingerprint_id, latest_generation, publish_change
from qbatch.models.hub import resolve_model
from qbatch.models.loading import load_spec
from qbatch.pipelines.cluster import MAX_RETRIES, PoolPlan
from qbatch.pipelines.embed import EmbedCorpusConfig, embedding_fingerprint, make_task
from qbatch.pipelines.embed_resume import Plan, draft_of_units
from qbatch.pipelines.finished_units import finished_units
from qbatch.pipelines.pair_scoring import (
    PairPrompts,
    ScoringTask,
    score_units,
    scoring_fingerprint,
)
from qbatch.pipelines.pair_source import PairSource, read_pairs
from qbatch.pipelines.rerank_shuffle import stable_hashes
from qbatch.pipelines.unit_files import write_unit_file
from qbatch.report.rerank_progress import RerankProgress
from qbatch.schema import vector_array
from qbatch.storage import Storage
from qbatch.tables import PublishedTable
from qbatch.training.near_duplicates import text_keys
from qbatch.training.negatives import Positives

log = logging.getLogger(__name__)

FACTS = ("positive_score", "query_key", "id_key", "text_key")
"""Columns of the query vectors table beside the vectors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexModel:
    """The model of an index as it lies here."""

    model: str
    revision: str | None
    embedding: Mapping[str, Any]
    """Fingerprint of the indexed vectors."""
    dim: int


def scoring_task(
    source: PairSource, model: IndexModel, output: str, instruction: str | None
) -> tuple[ScoringTask, dict[str, Any], dict[str, Any]]:
    """Return how pairs are embedded: as the index's documents were.

    Returns:
        The task, what decides about its vectors, and the fingerprint of the query vectors table.

    Raises:
        ConfigError: The model is not that of the index.
    """
    spec = load_spec(resolve_model(model.model, model.revision))
    config = EmbedCorpusConfig(
        input=source.corpus.input,
        output=output,
        model=model.model,
        revision=model.revision,
        max_tokens=model.embedding["max_tokens"],
        weights=weights_of(model.embedding),
        dims=(model.dim,),
    )
    task = ScoringTask(
        source=source,
        embed=make_task(config, spec, model.embedding["dtype"]),
        prompts=PairPrompts.of(spec, instruction),
    )
    vectors = embedding_fingerprint(task.embed, spec)
    check_same_space(model.embedding, vectors)
    settings = scoring_fingerprint(task, vectors)
    return task, settings, {**vectors, "prompt": settings["prompts"]}


def embed_queries(
    task: ScoringTask, settings: Mapping[str, Any], vectors: Mapping[str, Any], pool: PoolPlan
) -> dict[str, Unit]:
    """Publish the query vectors of all pairs; return the unit of each of the table's files."""
    storage = Storage(task.embed.output)
    current = latest_generation(storage)
    units = list(task.source.plan_units())
    plan = Plan(units, fingerprint_id(settings))
    by_key = dict(zip(plan.keys.to_pylist(), units, strict=True))
    done = finished_units(storage, plan.keys, current)
    known = set(done["unit_key"].to_pylist())
    pending = [(key, unit) for key, unit in by_key.items() if key not in known]
    log.info("%d units of pairs planned, %d to be embedded", len(units), len(pending))
    progress = RerankProgress(len(pending))
    for stats, _ in score_units(pending, task, pool, partial(_write_queries, storage, task.source)):
        progress.add(stats, stats)
    outputs = finished_units(storage, plan.keys, current)
    draft = draft_of_units(
        storage,
        plan,
        outputs,
        kind="vectors",
        fingerprint=vectors,
        config={"model": task.embed.model, "revision": task.embed.revision},
        counts={"passages": sum(outputs["rows"].to_pylist())},
    )
    publish_change(storage, draft, current)
    return {row["path"]: by_key[row["unit_key"]] for row in outputs.to_pylist()}


def _write_queries(
    storage: Storage,
    source: PairSource,
    key: str,
    unit: Unit,
    queries: np.ndarray,
    documents: np.ndarray,
) -> str:
    pairs = read_pairs(unit, source).pairs
    if len(pairs) != len(queries):
        raise IntegrityError(
            f"unit {key} has {len(queries)} vectors for {len(pairs)} pairs; nothing was written. "
            "This is a bug: report it with the input"
        )
    texts = [pairs[name].to_pylist() for name in ("query", "document")]
    table = pa.table(
        {
            "doc_id": pa.array([str(i) for i in range(len(pairs))], pa.large_string()),
            "passage_index": pa.array(np.zeros(len(pairs), np.int32)),
            "vector": vector_array(queries),
            "positive_score": np.einsum("ij,ij->i", queries, documents).astype(np.float32),
            "query_key": text_keys(texts[0]),
            "id_key": stable_hashes(pairs["doc_id"]) if len(pairs) else np.empty(0, np.uint64),
            "text_key": text_keys(texts[1]),
        }
    )
    counts = {"rows_in": len(pairs), "rows_out": len(pairs), "rejected": {}}
    record = {"unit_key": key, "fingerprint": "", "counts": counts, "rejects": None}
    return str(write_unit_file(storage, record, table)["path"])


def collect_positives(table: PublishedTable) -> tuple[Positives, Positives]:
    """Return all positives by id and by text: sixteen bytes a pair each in this process."""
    read = ray.remote(max_retries=MAX_RETRIES)(_read_keys)
    found = ray.get([read.remote(table, e) for e in table.generation.files.to_pylist()])
    queries, ids, texts = (np.concatenate(keys) for keys in zip(*found, strict=True))
    return Positives(queries, ids), Positives(queries, texts)


def _read_keys(table: PublishedTable, entry: Mapping[str, Any]) -> list[np.ndarray]:
    names = ["query_key", "id_key", "text_key"]
    read = table.read_file(entry, names)
    return [read[name].to_numpy() for name in names]

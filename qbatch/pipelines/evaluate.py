"""The evaluate job: a run, or models on evaluation sets, become metrics."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qbatch.cli import StrList
from qbatch.errors import ConfigError
from qbatch.evaluation.comparison import compare
from qbatch.evaluation.metrics import Judgements, Metric, parse_metrics, score_queries
from qbatch.evaluation.ranking import rank_documents
from qbatch.evaluation.reading import read_qrels, read_run
from qbatch.report.writing import write_report
from qbatch.schema import ComputeDtype, Weights
from qbatch.storage import Storage

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Measure a run against judgements, or models on evaluation sets."""

    run: str | None = None
    """Run to measure: a published table, or a TREC, TSV, JSONL or Parquet file."""
    qrels: str | None = None
    """Judgements: the same forms, or a folder in the layout of BEIR."""
    metrics: StrList = ("ndcg@10", "recall@100", "mrr@10", "map")
    """ndcg, mrr, map, with or without @K; recall@K, precision@K, success@K."""
    compare_to: str | None = None
    """Another run, to be measured beside this one with a paired randomisation test."""
    split: str = "test"
    """Split of a BEIR folder: the file in its qrels/."""
    seed: int = 0
    """Seed of the randomisation test."""
    output: str | None = None
    """Directory for report.json, and per_query.parquet or tasks.parquet; None writes no files."""
    model: str | None = None
    """Embedder to measure on --datasets, instead of --run and --qrels: directory or hub id."""
    datasets: StrList = ()
    """Folders in the layout of BEIR or MTEB's retrieval tasks by name (mteb:scifact), small enough
    for exact search in this process."""
    revision: str | None = None
    """Commit of a hub id."""
    dim: int | None = None
    """Leading components of the vectors (Matryoshka); None is all."""
    reranker: str | None = None
    """Reranker to measure on what the embedder finds: directory or hub id."""
    reranker_revision: str | None = None
    """Commit of a hub id."""
    rerank_depth: int = 100
    """Documents of a query that the reranker sees."""
    instruction: str | None = None
    """Task sentence of sets that --instructions does not name; None is the model's own."""
    instructions: str | None = None
    """JSON file with the task sentence of each set by its name, or its folder's."""
    dtype: Literal["auto"] | ComputeDtype = "auto"
    """Compute dtype; auto is bfloat16 where the processor has it, else float32."""
    weights: Weights = "float"
    """int8 rounds the embedder's as --weights of embed_corpus does; float32 only."""

    def __post_init__(self) -> None:
        parse_metrics(self.metrics)
        if (self.run is None) == (self.model is None):
            raise ConfigError(
                f"--run={self.run} and --model={self.model}: give one of them, the run to measure "
                "or the embedder"
            )
        if (self.run is None) != (self.qrels is None) or (self.model is None) != (
            not self.datasets
        ):
            raise ConfigError(
                f"--run={self.run} goes with --qrels={self.qrels}, --model={self.model} with "
                f"--datasets={','.join(self.datasets)}; give both of either"
            )
        if self.rerank_depth < 1:
            raise ConfigError(f"rerank_depth is {self.rerank_depth}; give 1 or more")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; give 0 or more")


@dataclass(frozen=True, slots=True)
class _Measured:
    """A run with its metrics."""

    uri: str
    values: np.ndarray
    """Shape (num_judged_queries, num_metrics)."""
    counts: dict[str, int]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        QbatchError: Each subclass ends the job with its own exit code; see qbatch.errors.
    """
    if config.run is None or config.qrels is None:
        return _evaluate_models(config)
    metrics = parse_metrics(config.metrics)
    judgements = Judgements.from_table(read_qrels(config.qrels, config.split))
    measured = _measure(config.run, judgements, metrics)
    other = None
    if config.compare_to is not None:
        other = _measure(config.compare_to, judgements, metrics)
    summary = {
        "qrels": config.qrels,
        "queries": len(judgements.by_query),
        "queries_without_relevant": judgements.num_without_relevant,
        **_summary(measured, metrics),
    }
    if other is not None:
        summary["compared_to"] = _summary(other, metrics)
        summary["comparison"] = {
            str(metric): asdict(compare(values, beside, seed=config.seed))
            for metric, values, beside in zip(
                metrics, measured.values.T, other.values.T, strict=True
            )
        }
    log.info("%d judged queries\n%s", summary["queries"], format_table(summary))
    if config.output is not None:
        values = _per_query(judgements, metrics, measured, other)
        _write(Storage(config.output), summary, ("per_query.parquet", values))
    return summary


def _evaluate_models(config: EvaluateConfig) -> dict[str, Any]:
    # Measuring a run loads no model and no torch.
    from qbatch.pipelines import evaluate_model as models  # noqa: PLC0415

    under_test = models.ModelsUnderTest(
        datasets=config.datasets,
        model=str(config.model),
        revision=config.revision,
        dim=config.dim,
        reranker=config.reranker,
        reranker_revision=config.reranker_revision,
        rerank_depth=config.rerank_depth,
        instruction=config.instruction,
        instructions=models.read_instructions(config.instructions),
        dtype=config.dtype,
        split=config.split,
        weights=config.weights,
    )
    summary = models.measure_models(under_test, parse_metrics(config.metrics))
    log.info("%d sets\n%s", len(config.datasets), models.format_tasks(summary))
    if config.output is not None:
        values = models.tasks_table(summary)
        _write(Storage(config.output), summary, ("tasks.parquet", values))
    return summary


def _measure(uri: str, judgements: Judgements, metrics: Sequence[Metric]) -> _Measured:
    ranking = rank_documents(read_run(uri))
    is_judged = pc.is_in(ranking.query_ids, pa.array(judgements.by_query, pa.large_string()))
    num_judged = pc.sum(is_judged).as_py()
    if not num_judged:
        judged = next(iter(judgements.by_query))
        raise ConfigError(
            f"no query of {uri} is judged: the run has {ranking.query_ids[0].as_py()!r}, the "
            f"judgements have {judged!r}. Give the judgements that belong to the run"
        )
    counts = {
        "documents": len(ranking.doc_ids),
        "repeated_documents": ranking.num_repeats,
        "queries_not_judged": len(ranking.query_ids) - num_judged,
        "queries_without_documents": len(judgements.by_query) - num_judged,
    }
    _warn(uri, counts, ranking.num_inversions)
    return _Measured(uri, score_queries(ranking, judgements, metrics), counts)


def _warn(uri: str, counts: dict[str, int], num_inversions: int) -> None:
    if counts["queries_without_documents"]:
        log.warning(
            "%s has no documents for %d judged queries; they count as 0",
            uri, counts["queries_without_documents"],
        )  # fmt: skip
    if counts["queries_not_judged"]:
        log.warning(
            "%d queries of %s are not judged; they are left out", counts["queries_not_judged"], uri
        )
    if num_inversions:
        log.warning(
            "scores of %s rise %d times where ranks fall; the order is that of the ranks",
            uri, num_inversions,
        )  # fmt: skip


def _summary(measured: _Measured, metrics: Sequence[Metric]) -> dict[str, Any]:
    means = measured.values.mean(axis=0).tolist()
    by_name = dict(zip(map(str, metrics), means, strict=True))
    return {"run": measured.uri, **measured.counts, "metrics": by_name}


def format_table(summary: Mapping[str, Any]) -> str:
    """Return the metrics of a summary as lines for a person."""
    rows: list[tuple[str, ...]] = [("metric", "mean")]
    rows += [(name, f"{mean:.4f}") for name, mean in summary["metrics"].items()]
    if "comparison" in summary:
        rows[0] = ("metric", "run", "other", "difference", "p", "wins", "ties", "losses")
        others = summary["compared_to"]["metrics"].values()
        for i, (other, found) in enumerate(
            zip(others, summary["comparison"].values(), strict=True), 1
        ):
            signed = (f"{found['difference']:+.4f}", f"{found['p_value']:.4f}")
            queries = (str(found[name]) for name in ("wins", "ties", "losses"))
            rows[i] += (f"{other:.4f}", *signed, *queries)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _per_query(
    judgements: Judgements, metrics: Sequence[Metric], measured: _Measured, other: _Measured | None
) -> pa.Table:
    """Return ``query_id``, ``metric``, ``value`` and, beside another run, ``compared_value``."""
    query_ids = pa.array(judgements.by_query, pa.large_string())
    rows = np.repeat(np.arange(len(query_ids)), len(metrics))
    columns = {
        "query_id": query_ids.take(pa.array(rows)),
        "metric": pa.array([str(m) for m in metrics] * len(query_ids), pa.large_string()),
        "value": pa.array(measured.values.reshape(-1)),
    }
    if other is not None:
        columns["compared_value"] = pa.array(other.values.reshape(-1))
    return pa.table(columns)


def _write(storage: Storage, summary: dict[str, Any], table: tuple[str, pa.Table]) -> None:
    name, values = table
    sink = pa.BufferOutputStream()
    pq.write_table(values, sink)
    storage.write(name, sink.getvalue().to_pybytes())
    write_report(storage, "evaluation", summary)

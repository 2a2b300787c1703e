"""Metrics of a ranking against judgements, computed by trec_eval's own code.

nDCG takes the relevance itself as gain and log2(place + 1) as discount. A document is relevant from
relevance 1 on; relevance below 0 counts as 0. A query for which nothing is relevant gets 0 in every
metric and stays in the mean, as in trec_eval.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pytrec_eval import RelevanceEvaluator

from qbatch.errors import ConfigError
from qbatch.evaluation.ranking import Ranking

_BATCH_ROWS = 500_000
"""Rows of a run held as Python objects at a time; about 100 bytes each."""

_PATTERN = re.compile(r"([a-z_]+)(?:@([1-9][0-9]{0,8}))?")

_ALIASES = {"rr": "mrr", "p": "precision", "hit_rate": "success"}

_WITHOUT_CUTOFF = {"ndcg": "ndcg", "map": "map", "mrr": "recip_rank"}

_WITH_CUTOFF = {
    "ndcg": "ndcg_cut",
    "map": "map_cut",
    "recall": "recall",
    "precision": "P",
    "success": "success",
}
"""Our name to trec_eval's; mrr has none there and is cut here."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One number a query, from 0 to 1, higher is better."""

    name: str
    cutoff: int | None
    """Documents that are looked at; None is all."""

    def __str__(self) -> str:
        return self.name if self.cutoff is None else f"{self.name}@{self.cutoff}"

    @property
    def trec_name(self) -> str:
        """What trec_eval calls it; mrr has no cutoff there."""
        if self.cutoff is None or self.name == "mrr":
            return _WITHOUT_CUTOFF[self.name]
        return f"{_WITH_CUTOFF[self.name]}_{self.cutoff}"

    def value(self, measured: Mapping[str, float]) -> float:
        """Return the metric of a query from what trec_eval measured for it."""
        value = measured[self.trec_name]
        if self.name == "mrr" and self.cutoff is not None and value < 1 / self.cutoff:
            return 0.0
        return value


@dataclass(frozen=True, slots=True)
class Judgements:
    """Relevance by query and document."""

    by_query: Mapping[str, Mapping[str, int]]
    """In order of the bytes of the query ids; negative relevance is 0."""

    @classmethod
    def from_table(cls, qrels: pa.Table) -> "Judgements":
        """Index schema.QRELS without repeated rows."""
        by_query: dict[str, dict[str, int]] = {}
        ordered = qrels.sort_by([("query_id", "ascending"), ("doc_id", "ascending")])
        relevance = pc.max_element_wise(ordered["relevance"], 0)
        for query_id, doc_id, value in zip(
            ordered["query_id"].to_pylist(),
            ordered["doc_id"].to_pylist(),
            relevance.to_pylist(),
            strict=True,
        ):
            by_query.setdefault(query_id, {})[doc_id] = value
        return cls(by_query)

    @property
    def num_without_relevant(self) -> int:
        """Queries for which no document is relevant."""
        return sum(not any(judged.values()) for judged in self.by_query.values())


def parse_metrics(names: Sequence[str]) -> tuple[Metric, ...]:
    """Return the metrics of names such as ``ndcg@10``, each once, in their order.

    Raises:
        ConfigError: There is no such metric, or none at all.
    """
    if not names:
        raise ConfigError("no metric is asked for; give names such as ndcg@10,recall@100,map")
    return tuple(dict.fromkeys(_parse_metric(name) for name in names))


def _parse_metric(text: str) -> Metric:
    match = _PATTERN.fullmatch(text.strip().lower())
    name = match[1] if match else ""
    name = _ALIASES.get(name, name)
    cutoff = int(match[2]) if match and match[2] else None
    if name not in (_WITHOUT_CUTOFF if cutoff is None else {*_WITH_CUTOFF, "mrr"}):
        raise ConfigError(
            f"unknown metric {text!r}; use ndcg, mrr (rr), map, with or without @K, and "
            "recall@K, precision@K (p@K), success@K (hit_rate@K), where K is a number from 1"
        )
    return Metric(name, cutoff)


def score_queries(
    ranking: Ranking, judgements: Judgements, metrics: Sequence[Metric]
) -> np.ndarray:
    """Return float64 of shape (num_judged_queries, num_metrics), in the order of the judgements.

    A judged query without documents in the ranking gets 0; queries that are not judged are left
    out.
    """
    rows = {query_id: row for row, query_id in enumerate(judgements.by_query)}
    values = np.zeros((len(rows), len(metrics)))
    names = {metric.trec_name for metric in metrics}
    for first, last in ranking.iter_batches(_BATCH_ROWS):
        batch = _batch(ranking, first, last, judgements)
        judged = {query_id: judgements.by_query[query_id] for query_id in batch}
        for query_id, measured in RelevanceEvaluator(judged, names).evaluate(batch).items():
            values[rows[query_id]] = [metric.value(measured) for metric in metrics]
    return values


def _batch(
    ranking: Ranking, first: int, last: int, judgements: Judgements
) -> dict[str, dict[str, float]]:
    """Return document to a falling number for every judged query of the batch.

    trec_eval orders by score and breaks ties by id: numbers that differ keep our order.
    """
    batch = {}
    for query, query_id in enumerate(ranking.query_ids.slice(first, last - first).to_pylist()):
        if query_id in judgements.by_query:
            start, stop = ranking.offsets[first + query : first + query + 2].tolist()
            doc_ids = ranking.doc_ids.slice(start, stop - start).to_pylist()
            batch[query_id] = dict(zip(doc_ids, range(len(doc_ids), 0, -1), strict=True))
    return batch

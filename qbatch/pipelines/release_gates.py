"""What must hold before a night is released: gates over published tables, each with a limit.

Counts must balance, vectors must be sound, the index must find what it should, and answers must not
have moved further from the last release than the operator allows. Gates read a seeded sample of
files, so that their cost does not follow the corpus.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qbatch.corpus.reasons import num_bad_rows, num_row_rejects
from qbatch.errors import ConfigError
from qbatch.evaluation.comparison import compare
from qbatch.evaluation.metrics import Judgements, parse_metrics, score_queries
from qbatch.evaluation.ranking import rank_documents
from qbatch.evaluation.reading import read_qrels
from qbatch.manifest import read_verified
from qbatch.pipelines.precompute_slices import partitions_of
from qbatch.schema import FILES, vector_column_names, vector_matrix
from qbatch.tables import PublishedTable

Tables = Mapping[str, PublishedTable]
"""By name, as in a release: vectors, index, and any of PRECOMPUTED."""

PRECOMPUTED = ("answers", "related")

_MAX_SAMPLED_KEYS = 200_000
"""Of each table, for drift and overlap."""

_METRICS = ("ndcg@10", "recall@10", "mrr@10")
"""The first decides, the others are reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatesConfig:
    """What must hold before a night is released; what compares needs a release to compare with."""

    max_rejected_fraction: float = 0.001
    """Share of the corpus's rows that may be rejected as faulty."""
    max_document_loss: float = 0.2
    """Share of the last release's documents that may be gone."""
    min_recall: float = 0.9
    """Recall@10 of the index on the probes that confirm it."""
    max_norm_error: float = 0.02
    """Furthest distance of a stored vector's length from 1, for models that give unit vectors."""
    max_score_drift: float = 0.2
    """Kolmogorov-Smirnov distance between the best scores of keys now and in the last release."""
    min_overlap: float = 0.5
    """Mean share of a key's items that it had in the last release as well."""
    qrels: str | None = None
    """Judgements of the answers' queries, in any form that evaluate.py reads; None for none."""
    qrels_split: str = "test"
    """Split of a BEIR folder."""
    min_ndcg: float = 0.0
    """nDCG@10 of the answers on the judgements."""
    max_ndcg_drop: float = 0.02
    """How far nDCG@10 may fall below the last release's."""
    sampled_files: int = 16
    """Files of each table that are read for norms, drift and overlap."""
    seed: int = 0
    """Which files, and the signs of the randomisation test."""

    def __post_init__(self) -> None:
        for field in ("max_rejected_fraction", "max_document_loss", "min_recall", "min_overlap"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"{field} is {getattr(self, field)}; give 0 to 1")
        if self.sampled_files < 1:
            raise ConfigError(f"sampled_files is {self.sampled_files}; give 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """One number and what it has to keep to."""

    name: str
    value: float
    rule: Literal["at most", "at least"]
    threshold: float

    @property
    def passed(self) -> bool:
        """NaN passes nothing."""
        if self.rule == "at most":
            return self.value <= self.threshold
        return self.value >= self.threshold

    def as_dict(self) -> dict[str, Any]:
        """Return what reports and manifests keep."""
        value = round(self.value, 6) if np.isfinite(self.value) else str(self.value)
        return {**asdict(self), "value": value, "verdict": "pass" if self.passed else "FAIL"}


def format_gates(gates: Sequence[Mapping[str, Any]]) -> str:
    """Return gates, as dictionaries, as lines for a person."""
    rows = [("gate", "value", "threshold", "verdict")]
    rows += [
        (g["name"], str(g["value"]), f"{g['rule']} {g['threshold']:g}", g["verdict"]) for g in gates
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def check_gates(
    tables: Tables, last: Tables | None, config: GatesConfig
) -> tuple[list[Gate], dict[str, Any] | None]:
    """Measure everything that the tables allow to measure.

    Args:
        tables: About to be released.
        last: Of the release to compare with; None compares with nothing.
        config: The thresholds.

    Returns:
        The gates, and the metrics of the answers if there are judgements.
    """
    gates = [*conservation_gates(tables), *corpus_gates(tables["vectors"], last, config)]
    gates += vector_gates(tables["vectors"], config)
    recall = tables["index"].generation.details["recall"]["10"]["mean"]
    gates.append(_at_least("recall@10 of the index", recall, config.min_recall))
    gates += drift_gates(tables, last, config)
    evaluation = evaluate_answers(tables, last, config)
    if evaluation is not None:
        gates += ndcg_gates(evaluation, config)
    return gates, evaluation


def _at_most(name: str, value: float, threshold: float) -> Gate:
    return Gate(name=name, value=float(value), rule="at most", threshold=threshold)


def _at_least(name: str, value: float, threshold: float) -> Gate:
    return Gate(name=name, value=float(value), rule="at least", threshold=threshold)


def conservation_gates(tables: Tables) -> list[Gate]:
    """Count what is missing, or too much, between one table and the next."""
    vectors = tables["vectors"].generation.counts
    rows = tables["vectors"].num_rows
    accounted = vectors["rows_embedded"] + num_row_rejects(vectors["rejected"])
    differences = {
        "rows of the corpus unaccounted for": vectors["rows_in"] - accounted,
        "passages not listed": vectors["passages"] - rows,
        "vectors not indexed": rows - tables["index"].generation.counts["ntotal"],
    }
    for name in PRECOMPUTED:
        if name in tables:
            keys = tables[name].generation.counts["keys"]
            differences[f"keys of {name} not listed"] = keys - tables[name].num_rows
    return [_at_most(name, abs(difference), 0) for name, difference in differences.items()]


def corpus_gates(
    vectors: PublishedTable, last: Tables | None, config: GatesConfig
) -> Iterator[Gate]:
    """Compare rejected and lost documents with what is allowed."""
    counts = vectors.generation.counts
    bad_share = num_bad_rows(counts["rejected"]) / max(1, counts["rows_in"])
    yield _at_most("rejected rows", bad_share, config.max_rejected_fraction)
    if last is not None:
        before = last["vectors"].generation.counts["rows_embedded"]
        lost = max(0, before - counts["rows_embedded"]) / max(1, before)
        yield _at_most("documents lost since the last release", lost, config.max_document_loss)


def vector_gates(vectors: PublishedTable, config: GatesConfig) -> list[Gate]:
    """Look for vectors without a direction, and for lengths that are not 1."""
    fingerprint = vectors.generation.fingerprint
    names = vector_column_names(fingerprint["dims"])
    scales = fingerprint["scales"] or [1.0] * len(names)
    num_bad, worst = 0, 0.0
    for entry in _sampled(vectors.generation.files.to_pylist(), config):
        table = vectors.read_file(entry, names)
        for name, scale in zip(names, scales, strict=True):
            norms = np.linalg.norm(vector_matrix(table[name]).astype(np.float32) / scale, axis=1)
            is_good = np.isfinite(norms) & (norms > 0)
            num_bad += int((~is_good).sum())
            if is_good.any():
                worst = max(worst, float(np.abs(norms[is_good] - 1).max()))
    gates = [_at_most("vectors that are zero, NaN or infinite", num_bad, 0)]
    if fingerprint["normalize"]:
        gates.append(_at_most("furthest length of a vector from 1", worst, config.max_norm_error))
    return gates


def _sampled(entries: Sequence[dict[str, Any]], config: GatesConfig) -> list[dict[str, Any]]:
    size = min(len(entries), config.sampled_files)
    chosen = np.random.default_rng(config.seed).choice(len(entries), size, replace=False)
    return [entries[i] for i in sorted(chosen.tolist())]


def drift_gates(tables: Tables, last: Tables | None, config: GatesConfig) -> Iterator[Gate]:
    """Compare scores and items with the last release; another model's are not comparable."""
    if last is None or _space(tables) != _space(last):
        return
    for name in PRECOMPUTED:
        if name not in tables or name not in last:
            continue
        now, before = _common_partitions(tables[name], last[name], config)
        drift = kolmogorov_smirnov(best_scores(now), best_scores(before))
        yield _at_most(f"drift of the best scores of {name}", drift, config.max_score_drift)
        yield _at_least(
            f"overlap of {name} with the last release", mean_overlap(now, before),
            config.min_overlap,
        )  # fmt: skip


def _space(tables: Tables) -> Mapping[str, Any]:
    return tables["vectors"].generation.fingerprint


def _common_partitions(
    now: PublishedTable, before: PublishedTable, config: GatesConfig
) -> tuple[pa.Table, pa.Table]:
    """Return the rows of the same sampled partitions; keys stay in theirs.

    Partitions of all numbers are read when the two have another number of them. Beyond
    _MAX_SAMPLED_KEYS keys are thinned out by their hash, the same ones on both sides.
    """
    ours, theirs = _partitions(now), _partitions(before)
    num_partitions = len(ours)
    if num_partitions == len(theirs):
        places = [{"place": place} for place in range(num_partitions)]
        chosen = [entry["place"] for entry in _sampled(places, config)]
        ours, theirs = ([entries[i] for i in chosen] for entries in (ours, theirs))
    one_in = max(1, sum(entry["rows"] for entry in ours) // _MAX_SAMPLED_KEYS)

    def read(table: PublishedTable, entries: Sequence[dict[str, Any]]) -> pa.Table:
        rows = (table.read_file(entry) for entry in entries)
        if one_in == 1:
            return pa.concat_tables(rows).combine_chunks()
        thinned = (
            part.filter(
                pa.array(partitions_of(part["key"], num_partitions * one_in) < num_partitions)
            )
            for part in rows
        )
        return pa.concat_tables(thinned).combine_chunks()

    return read(now, ours), read(before, theirs)


def _partitions(table: PublishedTable) -> list[dict[str, Any]]:
    """Return the FILES entries of precomputed rows in the order of partitions."""
    data = read_verified(table.storage, table.generation.plan or {})
    entries: list[dict[str, Any]] = pq.read_table(
        pa.BufferReader(data), columns=FILES.names
    ).to_pylist()
    return entries


def best_scores(rows: pa.Table) -> np.ndarray:
    """Return the first item's score of every key that has items: float32."""
    lists = rows["items"].combine_chunks()
    offsets = lists.offsets.to_numpy()
    starts = offsets[:-1][np.diff(offsets) > 0]
    scores: np.ndarray = lists.values.field("score").to_numpy()[starts]
    return scores


def kolmogorov_smirnov(left: np.ndarray, right: np.ndarray) -> float:
    """Return the largest distance between two empirical distribution functions, 0 to 1.

    Two empty samples are alike; an empty one and another are not at all.
    """
    if not len(left) or not len(right):
        return float(len(left) != len(right))
    values = np.concatenate([left, right])
    shares = [np.searchsorted(np.sort(side), values, "right") / len(side) for side in (left, right)]
    return float(np.abs(shares[0] - shares[1]).max())


def mean_overlap(now: pa.Table, before: pa.Table) -> float:
    """Return the mean over keys in both of the share of items now that were there before.

    A key that has no items in both counts as 1, as do two tables without a common key.
    """
    lists = dict(zip(before["key"].to_pylist(), _item_sets(before), strict=True))
    shares = [
        len(items & lists[key]) / max(1, len(items), len(lists[key])) if items or lists[key] else 1
        for key, items in zip(now["key"].to_pylist(), _item_sets(now), strict=True)
        if key in lists
    ]
    return float(np.mean(shares)) if shares else 1.0


def _item_sets(rows: pa.Table) -> Iterator[set[str]]:
    lists = rows["items"].combine_chunks()
    offsets = lists.offsets.to_numpy()
    doc_ids = lists.values.field("doc_id")
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        yield set(doc_ids.slice(start, stop - start).to_pylist())


def evaluate_answers(
    tables: Tables, last: Tables | None, config: GatesConfig
) -> dict[str, Any] | None:
    """Measure the answers, beside those of the other release, on the judgements.

    Returns:
        ``metrics``, and with another release ``compared_to`` and ``comparison``; None without
        judgements or answers.
    """
    if config.qrels is None or "answers" not in tables:
        return None
    metrics = parse_metrics(_METRICS)
    judgements = Judgements.from_table(read_qrels(config.qrels, config.qrels_split))
    values = score_queries(rank_documents(_judged_run(tables, judgements)), judgements, metrics)
    names = [str(metric) for metric in metrics]
    found: dict[str, Any] = {
        "queries": len(judgements.by_query),
        "metrics": dict(zip(names, values.mean(axis=0).tolist(), strict=True)),
    }
    if last is None or "answers" not in last:
        return found
    other = score_queries(rank_documents(_judged_run(last, judgements)), judgements, metrics)
    return found | {
        "compared_to": dict(zip(names, other.mean(axis=0).tolist(), strict=True)),
        "comparison": {
            name: asdict(compare(ours, theirs, seed=config.seed))
            for name, ours, theirs in zip(names, values.T, other.T, strict=True)
        },
    }


def _judged_run(tables: Tables, judgements: Judgements) -> pa.Table:
    """Return the answers of judged queries as a run: ``query_id``, ``doc_id``, ``rank``."""
    answers = tables["answers"]
    partitions = _partitions(answers)
    wanted = pa.array(judgements.by_query, pa.large_string())
    numbers = np.unique(partitions_of(wanted, len(partitions))).tolist()
    rows = pa.concat_tables([answers.read_file(partitions[number]) for number in numbers])
    rows = rows.filter(pc.is_in(rows["key"], wanted)).combine_chunks()
    lists = rows["items"].combine_chunks()
    parents = pc.list_parent_indices(lists)
    items = lists.flatten()
    starts = np.cumsum([0, *pc.list_value_length(lists).to_pylist()])[:-1]
    ranks = np.arange(len(items)) - np.repeat(starts, pc.list_value_length(lists).to_numpy()) + 1
    return pa.table(
        {
            "query_id": rows["key"].combine_chunks().take(parents),
            "doc_id": items.field("doc_id"),
            "rank": pa.array(ranks, pa.int32()),
        }
    )


def ndcg_gates(evaluation: Mapping[str, Any], config: GatesConfig) -> Iterator[Gate]:
    """Compare nDCG@10 of the answers with what is asked for, and with the other release."""
    name = _METRICS[0]
    value = evaluation["metrics"][name]
    yield _at_least(f"{name} of the answers", value, config.min_ndcg)
    if "compared_to" in evaluation:
        drop = evaluation["compared_to"][name] - value
        yield _at_most(f"drop of {name} since the last release", drop, config.max_ndcg_drop)

"""Reports of searches, rerankings, recommendations and evaluations."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qbatch.report.charts import Axis, Chart, Line, bar_chart, line_chart, stacked_bars
from qbatch.report.embedding import throughput_charts
from qbatch.report.page import (
    Body,
    Card,
    Grid,
    Report,
    find,
    histogram_chart,
    rejects,
    seconds_chart,
    shown,
)
from qbatch.report.samples import bins, clip, percentiles_by_rank, sample_rejects, sample_rows
from qbatch.tables import PublishedTable

NUM_SAMPLES = 10
"""Queries shown in full."""

_SAMPLE_DEPTH = 5
_OVERLAP_DEPTHS = (1, 3, 5, 10, 20, 50, 100)


def run_details(table: PublishedTable) -> dict[str, Any]:
    """Return how scores of a sample are spread, ten queries, and rejects."""
    rows = sample_rows(table, ["query_id", "doc_id", "rank", "score"])
    ranks, scores = rows["rank"].to_numpy(), rows["score"].to_numpy().astype(np.float64)
    return {
        "best_scores": bins(scores[ranks == 1]),
        "score_by_rank": percentiles_by_rank(ranks, scores),
        "samples": _found(rows),
        "rejected_samples": sample_rejects(table),
    }


def _found(rows: pa.Table) -> list[dict[str, Any]]:
    """Return the best documents of ten queries, spread over the sample, with their scores."""
    queries = pc.unique(rows["query_id"]).to_pylist()
    step = max(1, len(queries) // NUM_SAMPLES)
    chosen = pa.array(queries[::step][:NUM_SAMPLES], pa.large_string())
    best = pc.and_(
        pc.is_in(rows["query_id"].cast(pa.large_string()), chosen),
        pc.less_equal(rows["rank"], _SAMPLE_DEPTH),
    )
    return [
        {"query": clip(row["query_id"]), "rank": row["rank"]}
        | {"found": clip(row["doc_id"]), "score": round(row["score"], 4)}
        for row in rows.filter(best).to_pylist()
    ]


def reranked_details(table: PublishedTable) -> dict[str, Any]:
    """Return how a sample's scores are spread, and how far the reranker moved documents."""
    columns = ["rank", "score", "log_odds", "retrieval_rank"]
    rows = sample_rows(table, columns)
    scores = rows["score"].to_numpy().astype(np.float64)
    details = {
        "scores": bins(scores),
        "log_odds": bins(rows["log_odds"].to_numpy().astype(np.float64)),
        "rejected_samples": sample_rejects(table),
    }
    rows = rows.filter(pc.is_valid(rows["retrieval_rank"]))
    ranks, before = rows["rank"].to_numpy(), rows["retrieval_rank"].to_numpy()
    if len(rows):
        details["rank_after"] = percentiles_by_rank(before, ranks)
        details["overlap"] = [
            {"depth": depth, "kept": round(float((before[ranks <= depth] <= depth).mean()), 4)}
            for depth in _OVERLAP_DEPTHS
            if depth < ranks.max()
        ]
    return details


def side_by_side(ranked: pa.Table, texts: pa.Table) -> list[dict[str, Any]]:
    """Return for ten queries what the retrieval had at each rank, and what the reranker has.

    Args:
        ranked: schema.RERANKED of whole queries.
        texts: ``query_id``, ``doc_id``, ``query`` and ``text`` of the same pairs.
    """
    keys = zip(texts["query_id"].to_pylist(), texts["doc_id"].to_pylist(), strict=True)
    known = dict(zip(keys, texts["text"].to_pylist(), strict=True))
    queries = dict(zip(texts["query_id"].to_pylist(), texts["query"].to_pylist(), strict=True))
    names = ["query_id", "doc_id", "rank", "retrieval_rank", "score"]
    rows = ranked.select(names).to_pylist()
    at = {
        kind: {(row["query_id"], row[kind]): row for row in rows}
        for kind in ("rank", "retrieval_rank")
    }
    samples = []
    for query_id in list(dict.fromkeys(row["query_id"] for row in rows))[:NUM_SAMPLES]:
        for rank in range(1, _SAMPLE_DEPTH + 1):
            sample = {"query": clip(queries[query_id]), "rank": rank}
            for name, kind in {"retrieved": "retrieval_rank", "reranked": "rank"}.items():
                row = at[kind].get((query_id, rank))
                text = known.get((query_id, row["doc_id"])) if row else None
                sample[name] = clip(text) if text is not None else None
                sample[f"{name}_score"] = round(row["score"], 4) if row else None
            if sample["retrieved"] or sample["reranked"]:
                samples.append(sample)
    return samples


def run_body(report: Report) -> Body:
    """Return what the page of a search shows."""
    body = rejects(report)
    body.cards = [
        Card(name="Queries", path="queries"),
        Card(name="Rows", path="rows"),
        Card(name="Without hits", path="without_hits"),
        Card(name="Seconds", path="seconds.total", unit=" s"),
        Card(name="Generation", path="generation"),
    ]
    charts = [*seconds_chart(report, is_summed=True)]
    charts += histogram_chart(
        report, "details.best_scores", "Best score of a query", x_label="score", y_label="queries"
    )
    charts += _by_rank("Score by rank", report, "details.score_by_rank", "rank", "score")
    body.charts = charts + body.charts
    rows = _once([list(sample.values()) for sample in find(report, "details.samples") or []])
    if rows:
        columns = ["query", "rank", "document", "score"]
        body.grids.insert(0, Grid(title="Ten queries", columns=columns, rows=rows, is_grouped=True))
    return body


def reranked_body(report: Report) -> Body:
    """Return what the page of a reranked run shows."""
    body = rejects(report)
    body.cards = [
        Card(name="Queries", path="queries"),
        Card(name="Pairs", path="pairs"),
        Card(name="Pairs a second", path="pairs_per_s"),
        Card(name="Tokens", path="tokens"),
        Card(name="Share saved by shared prefixes", path="prefix_share"),
        Card(name="Seconds", path="seconds.total", unit=" s"),
        Card(name="Generation", path="generation"),
    ]
    charts = [*seconds_chart(report, is_summed=True), *throughput_charts(report, "pairs")]
    charts += histogram_chart(report, "details.scores", "Scores", x_label="score", y_label="pairs")
    charts += histogram_chart(
        report, "details.log_odds", "Log-odds", x_label="log-odds", y_label="pairs"
    )
    after = "details.rank_after"
    charts += _by_rank("Rank movement", report, after, "rank of the retrieval", "rank after")
    body.charts = [*charts, *_overlap(report), *_tokens_saved(report), *body.charts]
    rows = _once(
        [
            [sample[name] for name in ("query", "rank", "retrieved", "reranked", "reranked_score")]
            for sample in find(report, "details.samples") or []
        ]
    )
    if rows:
        columns = ["query", "rank", "the retrieval had", "the reranker has", "its score"]
        body.grids.insert(
            0, Grid(title="Ten queries, side by side", columns=columns, rows=rows, is_grouped=True)
        )
    return body


def _once(rows: list[list[Any]]) -> list[list[Any]]:
    """Name each query in its first row only."""
    queries = [None, *(row[0] for row in rows)]
    return [
        ["" if query == before else query, *rest]
        for before, (query, *rest) in zip(queries, rows, strict=False)
    ]


def _by_rank(title: str, report: Report, path: str, x: str, y: str) -> list[Chart]:
    """Return the median by rank, within the range of eight tenths."""
    points = find(report, path)
    if not points or len(points) < 2:
        return []
    chart = line_chart(
        title,
        [Line(name=y, x=[p["rank"] for p in points], y=[p["p50"] for p in points])],
        x=Axis(label=x),
        y=Axis(label=y),
        band=([p["p10"] for p in points], [p["p90"] for p in points]),
        note="Median, and the range from the 10th to the 90th percentile.",
    )
    return [chart]


def _overlap(report: Report) -> list[Chart]:
    kept = {f"top {p['depth']}": p["kept"] for p in find(report, "details.overlap") or []}
    if not kept:
        return []
    note = "Share of the reranker's best that were among as many of the retrieval's best."
    return [bar_chart("Overlap with the retrieval", kept, unit="share", note=note)]


def _tokens_saved(report: Report) -> list[Chart]:
    tokens, saved = report["tokens"], report["tokens_saved"]
    if not tokens:
        return []
    title = "Tokens, with shared prefixes computed once"
    parts = {"tokens": {"computed": tokens - saved, "saved": saved}}
    note = f"{shown(saved)} of {shown(tokens)} tokens were saved."
    return [stacked_bars(title, parts, unit="tokens", note=note)]


def recommendations_body(report: Report) -> Body:
    """Return what the page of precomputed recommendations shows."""
    body = rejects(report)
    body.cards = [
        Card(name="Keys", path="keys"),
        Card(name="Items", path="items"),
        Card(name="Keys without items", path="keys_without_items"),
        Card(name="Keys changed", path="changed_keys"),
        Card(name="Keys removed", path="removed_keys"),
        Card(name="Partitions made", path="partitions_made"),
        Card(name="Partitions reused", path="partitions_reused"),
        Card(name="Seconds", path="seconds.total", unit=" s"),
    ]
    body.charts = [*seconds_chart(report), *body.charts]
    return body


def evaluation_body(report: Report) -> Body:
    """Return what the page of an evaluation shows."""
    metrics: Mapping[str, float] = report.get("metrics", {})
    body = Body(cards=[Card(name="Judged queries", path="queries")])
    for name in metrics:
        body.cards.append(Card(name=name, path=f"metrics.{name}"))
    for stage in ("retrieval", "reranking"):  # of models, over several sets
        for name in report.get(f"mean_{stage}", {}):
            body.cards.append(Card(name=f"{name}, {stage}", path=f"mean_{stage}.{name}"))
    if metrics:
        body.charts.append(bar_chart("Metrics", metrics, unit="mean"))
    if "comparison" in report:
        names = ("difference", "p_value", "wins", "ties", "losses")
        other = report["compared_to"]["metrics"]
        rows = [
            [metric, metrics[metric], other[metric], *(found[name] for name in names)]
            for metric, found in report["comparison"].items()
        ]
        columns = ["metric", "this run", "the other", "difference", "p", "wins", "ties", "losses"]
        note = f"This run: {report['run']}. The other: {report['compared_to']['run']}."
        body.grids.append(Grid(title="Compared", columns=columns, rows=rows, note=note))
    return body

"""The report of an index build: what it finds for which effort, and how even its shards are."""

import numpy as np

from qbatch.report.charts import (
    MAX_BARS,
    Axis,
    Chart,
    Line,
    bar_chart,
    histogram,
    line_chart,
)
from qbatch.report.page import Body, Card, Grid, Report, seconds_chart
from qbatch.report.samples import bins

_MIB = 2**20


def index_body(report: Report) -> Body:
    """Return what the page of an index shows."""
    details = report["details"]
    body = Body(charts=seconds_chart(report))
    effort = [Card(name=name, path=f"search.{name}") for name in report["search"]]
    body.cards = [
        Card(name="Vectors", path="ntotal"),
        Card(name="Factory", path="factory"),
        Card(name="Recall@10", path="recall.10"),
        *effort,
        Card(name="Shards", path="num_shards"),
        Card(name="Shards reused", path="shards_reused"),
        Card(name="Seconds", path="seconds.total", unit=" s"),
        Card(name="Generation", path="generation"),
    ]
    body.charts += [*_curve(report), _depths(report), *_shards(report)]
    rows = [[point["effort"], point["recall"], point["seconds"]] for point in details["curve"]]
    body.grids.append(
        Grid(
            title="Recall@10 for effort",
            columns=["effort", "recall@10", "seconds for all probes"],
            rows=rows,
            tones=["good" if row[0] in report["search"].values() else "" for row in rows],
            note=f"Why this index: {report['reason']}.",
        )
    )
    return body


def _curve(report: Report) -> list[Chart]:
    """Return recall against time; nothing where every search is exact."""
    curve = report["details"]["curve"]
    if len(curve) < 2:
        return []
    effort = next(iter(report["search"].values()), None)
    chosen = next((point for point in curve if point["effort"] == effort), None)
    chart = line_chart(
        "Recall against time",
        [
            Line(
                name="tried",
                x=[point["seconds"] for point in curve],
                y=[point["recall"] for point in curve],
            )
        ],
        x=Axis(label="seconds for all probes, all shards"),
        y=Axis(label="recall@10"),
        mark=(chosen["seconds"], chosen["recall"], "chosen") if chosen else None,
    )
    return [chart]


def _depths(report: Report) -> Chart:
    recall = report["details"]["recall"]
    depths = sorted(recall, key=int)
    return line_chart(
        "Recall by depth",
        [
            Line(
                name="mean",
                x=range(len(depths)),
                y=[recall[depth]["mean"] for depth in depths],
            )
        ],
        x=Axis(label="depth", names=depths),
        y=Axis(label="recall"),
        band=([recall[d]["low"] for d in depths], [recall[d]["high"] for d in depths]),
        note="At the chosen effort, with its 95 % interval, on probes that did not choose it.",
    )


def _shards(report: Report) -> list[Chart]:
    """Return size, list balance and recall of the shards."""
    shards = report["details"].get("shards", [])
    sizes = [shard["bytes"] / _MIB for shard in shards]
    charts = [_by_shard("Size of shards", sizes, "MiB")]
    if all(shard["lists"] for shard in shards):
        balance = [shard["lists"]["imbalance"] for shard in shards]
        charts.append(_by_shard("Imbalance of lists", balance, "times the cost of even lists"))
    recall = report["details"]["recall_by_shard"]
    charts.append(_by_shard("Recall@10 by shard", recall, "recall@10"))
    return [chart for chart in charts if chart is not None]


def _by_shard(title: str, values: list[float], unit: str) -> Chart | None:
    """Return a bar for each shard, or a histogram of many; None of no shards."""
    counted = bins(np.asarray(values))
    if counted is None:
        return None
    if len(values) <= MAX_BARS:
        return bar_chart(title, {f"shard {i}": value for i, value in enumerate(values)}, unit=unit)
    return histogram(title, counted, x_label=unit, y_label="shards")

"""The report of a night: what changed, which gates held, and how releases went so far."""

from collections.abc import Sequence
from typing import Any

from qbatch.release import open_release, release_numbers
from qbatch.report.charts import Axis, Chart, Line, bar_chart, line_chart, stacked_bars
from qbatch.report.page import Body, Card, Grid, Report, find
from qbatch.storage import Storage

_MAX_RELEASES = 20

_MADE = {
    "vectors": ("units", "units_made", "units_reused"),
    "index": ("shards", "shards_made", "shards_reused"),
    "answers": ("partitions", "partitions_made", "partitions_reused"),
    "related": ("partitions", "partitions_made", "partitions_reused"),
}
"""By step: what it is made of, and where its summary counts them."""


def release_trend(storage: Storage) -> dict[str, Any]:
    """Return ``releases``: what the last twenty hold, and what their gates measured."""
    numbers = release_numbers(storage)[-_MAX_RELEASES:]
    releases = [open_release(storage.uri, number) for number in numbers]
    return {
        "releases": [
            {
                "release": release.number,
                "documents": release.generation.counts["vectors"]["rows_embedded"],
                "passages": release.generation.counts["vectors"]["passages"],
                "gates": {
                    gate["name"]: gate["value"]
                    for gate in release.generation.details["gates"]
                    if gate["rule"] == "at least"
                },
            }
            for release in releases
        ]
    }


def night_body(report: Report) -> Body:
    """Return what the page of a night shows."""
    steps = [name for name in _MADE if name in report]
    body = Body(
        cards=[
            Card(name="Released", path="released"),
            Card(name="Release", path="release"),
            Card(name="Compared with release", path="compared_with"),
            Card(name="Documents", path="vectors.rows_in"),
            Card(name="Passages embedded now", path="vectors.passages_embedded"),
            Card(name="Vectors in the index", path="index.ntotal"),
            Card(name="Answers changed", path="answers.changed_keys"),
            Card(name="Related changed", path="related.changed_keys"),
            Card(name="Seconds", path="seconds", unit=" s"),
        ],
        links={name: f"{ref['path']}/report.html" for name, ref in report["tables"].items()},
    )
    if steps:
        body.charts += _steps(report, steps)
        body.grids.append(_changes(report, steps))
    if report.get("gates"):
        body.grids.insert(0, _gates(report["gates"]))
    body.charts += _trend(find(report, "details.releases") or [])
    return body


def _steps(report: Report, steps: Sequence[str]) -> list[Chart]:
    seconds = {name: report[name]["seconds"]["total"] for name in steps}
    charts = [bar_chart("Time by step", seconds, unit="seconds")]
    shares = {}
    for name in steps:
        _, made, reused = (report[name].get(key, 0) for key in _MADE[name])
        if made + reused:
            shares[name] = {"made": made / (made + reused), "reused": reused / (made + reused)}
    if shares:
        charts.append(stacked_bars("Made and reused", shares, unit="share"))
    return charts


def _changes(report: Report, steps: Sequence[str]) -> Grid:
    rows = []
    for name in steps:
        kind, made, reused = _MADE[name]
        changed = [report[name].get(key) for key in ("changed_keys", "removed_keys")]
        rows.append([name, kind, report[name][made], report[name][reused], *changed])
    columns = ["step", "made of", "made", "reused", "keys changed", "keys removed"]
    return Grid(title="What changed", columns=columns, rows=rows)


def _gates(gates: Sequence[dict[str, Any]]) -> Grid:
    """Return what was checked; what failed stands out."""
    return Grid(
        title="Gates",
        columns=["gate", "verdict", "value", "limit"],
        rows=[
            [g["name"], g["verdict"], g["value"], f"{g['rule']} {g['threshold']:g}"] for g in gates
        ],
        tones=["good" if gate["verdict"] == "pass" else "bad" for gate in gates],
    )


def _trend(releases: Sequence[dict[str, Any]]) -> list[Chart]:
    """Return how releases went, once there are two."""
    if len(releases) < 2:
        return []
    numbers = [release["release"] for release in releases]
    counts = [
        Line(name=name, x=numbers, y=[release[name] for release in releases])
        for name in ("documents", "passages")
    ]
    names = list(releases[-1]["gates"])[:3]
    measured = [
        Line(
            name=name,
            x=[r["release"] for r in releases if isinstance(r["gates"].get(name), int | float)],
            y=[r["gates"][name] for r in releases if isinstance(r["gates"].get(name), int | float)],
        )
        for name in names
    ]
    lines = {"Size by release": (counts, "rows"), "Quality by release": (measured, "measured")}
    return [
        line_chart(title, drawn, x=Axis(label="release", whole=True), y=Axis(label=unit))
        for title, (drawn, unit) in lines.items()
        if drawn
    ]

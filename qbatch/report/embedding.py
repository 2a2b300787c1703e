"""The report of an embed job: speed, lengths of passages, and what was rejected."""

from typing import Any

from qbatch.report.charts import Axis, Chart, Line, line_chart
from qbatch.report.page import (
    Body,
    Card,
    Report,
    find,
    histogram_chart,
    rejects,
    seconds_chart,
)
from qbatch.report.samples import bins, sample_rejects, sample_rows
from qbatch.tables import PublishedTable


def vectors_details(table: PublishedTable) -> dict[str, Any]:
    """Return ``passage_tokens``, a histogram over a sample, and ``rejected_samples``."""
    tokens = sample_rows(table, ["num_tokens"])["num_tokens"].to_numpy()
    return {
        "passage_tokens": bins(tokens.astype(float), whole=True),
        "rejected_samples": sample_rejects(table),
    }


def vectors_body(report: Report) -> Body:
    """Return what the page of a vectors table shows."""
    body = rejects(report)
    body.cards = [
        Card(name="Documents read", path="rows_in"),
        Card(name="Passages", path="passages"),
        Card(name="Embedded now", path="passages_embedded"),
        Card(name="Tokens", path="tokens"),
        Card(name="Pack fill", path="pack_fill"),
        Card(name="Seconds", path="seconds.total", unit=" s"),
        Card(name="Units reused", path="units_reused"),
        Card(name="Generation", path="generation"),
        Card(name="Tokens/s of an actor", path="details.compute.tokens_per_s_of_an_actor"),
        Card(name="Teraflops reached", path="details.compute.teraflops"),
        Card(name="Actor hours", path="details.compute.actor_hours"),
        Card(name="Cost", path="details.compute.cost"),
        Card(name="Cost per million passages", path="details.compute.cost_per_million_passages"),
    ]
    body.charts = [
        *seconds_chart(report, is_summed=True),
        *histogram_chart(
            report,
            "details.passage_tokens",
            "Length of passages",
            x_label="tokens",
            y_label="passages",
            note="Of the first passages of up to eight files of the table.",
        ),
        *throughput_charts(report, "tokens"),
        *body.charts,
    ]
    return body


def throughput_charts(report: Report, what: str) -> list[Chart]:
    """Return what was done a second over time, and how full packs were, where the job knows."""
    found = find(report, "details.throughput")
    if not found or not found[f"{what}_per_s"]:
        return []
    charts = []
    note = "A unit of work counts evenly over the time its forward passes took."
    names = {f"{what}_per_s": f"{what.capitalize()} a second", "pack_fill": "Pack fill"}
    for key, title in names.items():
        if key in found:
            minutes = [(i + 0.5) * found["span_s"] / 60 for i in range(len(found[key]))]
            chart = line_chart(
                f"{title} over time",
                [Line(name=title, x=minutes, y=found[key])],
                x=Axis(label="minutes since the start"),
                y=Axis(label=title.lower(), from_zero=True),
                note=note,
            )
            charts.append(chart)
    return charts

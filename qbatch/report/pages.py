"""Which page belongs to which kind of report."""

from collections.abc import Callable
from typing import Literal

from qbatch.report.embedding import vectors_body
from qbatch.report.indexing import index_body
from qbatch.report.night import night_body
from qbatch.report.page import Body, Card, Report, rejects, render, seconds_chart
from qbatch.report.ranking import (
    evaluation_body,
    recommendations_body,
    reranked_body,
    run_body,
)
from qbatch.report.training import training_body

Kind = Literal[
    "vectors",
    "index",
    "run",
    "reranked",
    "recommendations",
    "night",
    "evaluation",
    "pairs",
    "model",
    "merged-model",
]
"""What a job made."""


def render_report(kind: Kind, report: Report) -> str:
    """Return the page of a report."""
    title, body = _PAGES[kind]
    return render(title, report, body(report))


def _general_body(report: Report) -> Body:
    """Return every number that stands by itself, the time, and what was rejected."""
    body = rejects(report)
    body.cards = [
        Card(name=name.replace("_", " ").capitalize(), path=name)
        for name, value in report.items()
        if isinstance(value, int | float)
    ]
    body.cards.append(Card(name="Seconds", path="seconds.total", unit=" s"))
    body.charts = [*seconds_chart(report), *body.charts]
    return body


_PAGES: dict[Kind, tuple[str, Callable[[Report], Body]]] = {
    "vectors": ("Vectors", vectors_body),
    "index": ("Index", index_body),
    "run": ("Search", run_body),
    "reranked": ("Reranking", reranked_body),
    "recommendations": ("Recommendations", recommendations_body),
    "night": ("The night", night_body),
    "evaluation": ("Evaluation", evaluation_body),
    "pairs": ("Training pairs", _general_body),
    "model": ("Training", training_body),
    "merged-model": ("Merged model", _general_body),
}

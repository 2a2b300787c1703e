"""The page of a report: what is on it, in which order, and how numbers are written.

Texts of documents and queries are hostile: everything that is not a chart is escaped by Jinja.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError

from qbatch.report.charts import Chart, bar_chart, histogram

Report = Mapping[str, Any]
"""The content of a report.json."""

_MAX_LISTED = 100
"""Entries of one list among all numbers; report.json has the rest."""

_HIDDEN = ("details.samples", "details.rejected_samples")
"""Texts, which are shown as tables of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One headline number."""

    name: str
    path: str
    """Where it stands in report.json: keys joined by dots."""
    unit: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table of texts and numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    tones: Sequence[str] = ()
    """Of each row: good or bad; () for none."""
    is_grouped: bool = False
    """The first cell of a row, where it is not empty, stands as a line above the row."""


@dataclass(kw_only=True, slots=True)
class Body:
    """What a kind of report shows before the list of all its numbers."""

    cards: list[Card] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    """Reports below this one: name to relative path."""


def render(title: str, report: Report, body: Body) -> str:
    """Return the page as HTML that refers to nothing outside itself but ``body.links``.

    Raises:
        ValueError: The template does not fit what it is to show.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["shown"] = shown
    template = files("qbatch.report").joinpath("page.html").read_text("utf-8")
    cards = [(card, found) for card in body.cards if (found := find(report, card.path)) is not None]
    numbers = list(iter_numbers(report))
    try:
        return environment.from_string(template).render(
            title=title, report=report, body=body, cards=cards, numbers=numbers
        )
    except TemplateError as error:
        raise ValueError(f"page.html cannot show {title!r}: {error}") from error


def find(report: Report, path: str) -> Any:  # noqa: ANN401 - whatever the report holds
    """Return the value at a dotted path; None where there is none."""
    value: Any = report
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def iter_numbers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Yield dotted path and value of everything in a report that is no container."""
    if path in _HIDDEN:
        return
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from iter_numbers(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value[:_MAX_LISTED]):
            yield from iter_numbers(inner, f"{path}.{i}")
        if len(value) > _MAX_LISTED:
            yield f"{path}.*", f"{len(value) - _MAX_LISTED} more in report.json"
    else:
        yield path, value


def shown(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return a value as people write it: 12,345 and 0.9417; nothing is a dash."""
    if value is None:
        return "–"  # noqa: RUF001 - a dash on the page
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.4g}"
    return str(value)


def seconds_chart(report: Report, *, is_summed: bool = False) -> list[Chart]:
    """Return where the time went, if the report says so by stage.

    Args:
        report: With ``seconds`` by stage and in ``total``.
        is_summed: Over processes that work at the same time.
    """
    seconds = report.get("seconds")
    stages = dict(seconds) if isinstance(seconds, Mapping) else {}
    total = stages.pop("total", None)
    if not any(stages.values()):
        return []
    summed = " Stages are summed over processes, and may exceed that." if is_summed else ""
    note = f"The whole job took {shown(total)} s.{summed}"
    return [bar_chart("Time by stage", stages, unit="seconds", note=note)]


def histogram_chart(
    report: Report, path: str, title: str, *, x_label: str, y_label: str, note: str = ""
) -> list[Chart]:
    """Return the histogram at a dotted path, if there is one."""
    counted = find(report, path)
    if counted is None:
        return []
    return [histogram(title, counted, x_label=x_label, y_label=y_label, note=note)]


def rejects(report: Report) -> Body:
    """Return what was rejected by reason, with samples where there are any."""
    body = Body()
    if reasons := report.get("rejected"):
        body.charts.append(bar_chart("Rejected by reason", reasons, unit="rows"))
    if samples := find(report, "details.rejected_samples"):
        columns = ("reason", "object", "row", "id", "detail", "content")
        keys = ("reason", "object_uri", "row", "doc_id", "detail", "raw")
        rows = [[sample[key] for key in keys] for sample in samples]
        body.grids.append(
            Grid(title="Rejected: some rows of each reason", columns=columns, rows=rows)
        )
    return body

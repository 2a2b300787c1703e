import json
from html.parser import HTMLParser

import pytest

from qbatch.report.pages import render_report
from tests.report.samples_of_reports import KINDS, read_report, rendered

HIDDEN = ("samples", "rejected_samples")
"""Texts; they are shown as tables."""


class Page(HTMLParser):
    """What stands on a page: tags with attributes, and the text of each cell with a path."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: list[tuple[str, object, str]] = []
        self.texts: list[str] = []
        self._open: tuple[str, object] | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        if "data-path" in found:
            self._open = (found["data-path"], json.loads(found["data-value"]))

    def handle_data(self, data):
        if self._open is not None:
            self.numbers.append((*self._open, data))
            self._open = None
        if data.strip():
            self.texts.append(data.strip())


def leaves(value, path=()):
    """Return every value of a report by its path."""
    if isinstance(value, dict):
        return {k: v for key, x in value.items() for k, v in leaves(x, (*path, key)).items()}
    if isinstance(value, list):
        return {k: v for i, x in enumerate(value) for k, v in leaves(x, (*path, str(i))).items()}
    return {".".join(path): value}


def expected_numbers(report):
    details = {k: v for k, v in report.get("details", {}).items() if k not in HIDDEN}
    return leaves({**report, "details": details} if "details" in report else report)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_on_the_page_are_those_of_the_report(kind):
    report = read_report(kind)
    page = Page(rendered(kind))
    expected = expected_numbers(report)
    assert {path: value for path, value, _ in page.numbers} == expected
    cards = [path for path, _, _ in page.numbers]
    assert len(cards) >= len(expected) + 3, "cards repeat some of the numbers"
    for path, value, shown in page.numbers:
        assert value == expected[path]
        if type(value) is int:
            assert int(shown.removesuffix(" s").replace(",", "")) == value
        elif type(value) is float:
            read = float(shown.removesuffix(" s").replace(",", ""))
            assert read == pytest.approx(value, rel=1e-3), path


@pytest.mark.parametrize("kind", KINDS)
def test_pages_refer_to_nothing_outside(kind):
    html = rendered(kind)
    page = Page(html)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "action", "srcset", "data"}:
                assert value == "data:," or value.startswith("#") or "model-" in value, (tag, value)
        assert not any(name.startswith("on") for name in attributes)
    assert not {"script", "img", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert "@import" not in html
    assert html.count("url(") == html.count("url(#")
    plain = html.replace("http://www.w3.org/2000/svg", "").replace(
        "http://www.w3.org/1999/xlink", ""
    )
    assert "http:" not in plain
    assert "https:" not in plain
    policies = [found["content"] for tag, found in page.tags if "http-equiv" in found]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


HOSTILE = "</td></svg></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'{{7*7}}$x^2$"


def poisoned(value):
    """Return a report whose every text, keys of counts by reason too, ends with an attack."""
    if isinstance(value, dict):
        return {k: {f"{r}{HOSTILE}": n for r, n in v.items()} if k == "rejected" else poisoned(v)
                for k, v in value.items()}  # fmt: skip
    if isinstance(value, list):
        return [poisoned(inner) for inner in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


@pytest.mark.parametrize("kind", ["vectors", "index", "reranked", "night"])
def test_hostile_texts_stay_texts(kind):
    report = read_report(kind)
    tags = {tag for tag, _ in Page(rendered(kind)).tags}
    attacked = poisoned(report)
    page = Page(render_report(kind, attacked))
    assert {tag for tag, _ in page.tags} <= tags | {"section", "p"}
    assert not any(name.startswith("on") for _, found in page.tags for name in found)
    assert any(HOSTILE in text for text in page.texts)


def test_rejects_are_shown_by_reason_with_samples():
    page = Page(rendered("vectors"))
    assert {"empty_text", "bad_json", "corrupt_file"} <= set(page.texts)
    assert '{"doc_id": "a17", "text": "cut off here' in page.texts
    assert "s3://bucket/corpus/part-3.jsonl" in page.texts


def test_what_failed_stands_out():
    report = read_report("night")
    page = Page(rendered("night"))
    assert report["error"] in page.texts
    rows = [found.get("class") for tag, found in page.tags if tag == "tr"]
    assert (rows.count("bad"), rows.count("good")) == (1, len(report["gates"]) - 1)
    links = [found["href"] for tag, found in page.tags if tag == "a"]
    assert links == [f"{ref['path']}/report.html" for ref in report["tables"].values()]


def test_the_chosen_effort_is_marked():
    report = read_report("index")
    page = Page(rendered("index"))
    assert report["search"] == {"nprobe": 4}
    assert [found.get("class") for tag, found in page.tags if tag == "tr"].count("good") == 1
    assert "chosen" in page.texts


@pytest.mark.parametrize("kind", ["vectors", "run", "reranked", "recommendations", "pairs"])
def test_a_report_without_details_has_a_page(kind):
    """As of a job whose details could not be read, or which found nothing to do."""
    report = {"generation": 3, "tokens": 0, "tokens_saved": 0, "rejected": {}, "seconds": {}}
    page = Page(render_report(kind, {**report, "details": {}}))
    assert ("generation", 3, "3") in page.numbers


def test_an_evaluation_of_models_shows_their_means():
    page = Page(render_report("evaluation", {"mean_retrieval": {"ndcg@10": 0.5}, "tasks": {}}))
    assert "ndcg@10, retrieval" in page.texts
    assert page.numbers[0] == ("mean_retrieval.ndcg@10", 0.5, "0.5")


def test_a_night_that_ended_early_has_a_page():
    report = {"released": False, "error": "it failed", "compared_with": None, "tables": {}}
    page = Page(render_report("night", {**report, "seconds": 1.5, "details": {"releases": []}}))
    assert "it failed" in page.texts


def test_long_lists_are_cut_and_say_so():
    curve = [
        {"step": i, "loss": 1 / (i + 1), "learning_rate": 1e-5, "grad_norm": 1.0}
        for i in range(150)
    ]
    page = Page(render_report("model", {"steps": 150, "seconds": 9.5, "curve": curve}))
    paths = [path for path, _, _ in page.numbers]
    assert "curve.99.loss" in paths
    assert "curve.100.loss" not in paths
    assert ("curve.*", "50 more in report.json", "50 more in report.json") in page.numbers

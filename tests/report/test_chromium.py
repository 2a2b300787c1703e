"""Pages in a real browser: nothing complained about, nothing fetched, nothing cut off."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qbatch.report.pages import render_report
from tests.report.chromium import NAMES, Tab, find_chromium, open_tab
from tests.report.samples_of_reports import KINDS, read_report, rendered

PHONE, DESKTOP = 390, 1280


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    binary = find_chromium()
    if binary is None:
        pytest.skip(f"no Chromium here; looked for {', '.join(NAMES)}")
    with open_tab(binary, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("kind", KINDS)
def test_pages_open_on_phone_and_desktop(kind, tab, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(rendered(kind), encoding="utf-8")
    backgrounds = set()
    for width, scheme in ((PHONE, "light"), (DESKTOP, "dark")):
        tab.open(page, width=width, scheme=scheme)
        tab.evaluate("document.querySelector('details').open = true")
        assert tab.complaints == []
        assert tab.requests == [page.as_uri()]
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("document.querySelector('h1').offsetWidth") > 0.8 * min(width, 1100)
        backgrounds.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        shot = tmp_path / f"{kind}-{width}-{scheme}.png"
        tab.screenshot(shot)
        assert shot.read_bytes().startswith(b"\x89PNG")
    assert len(backgrounds) == 2


def test_lines_of_charts_follow_the_colour_scheme(tab, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(rendered("vectors"), encoding="utf-8")
    colours = []
    for scheme in ("light", "dark"):
        tab.open(page, width=DESKTOP, scheme=scheme)
        colours.append(
            json.loads(
                tab.evaluate(
                    "JSON.stringify([...document.querySelectorAll('svg text')].map("
                    "text => getComputedStyle(text).fill))"
                )
            )
        )
    assert len(colours[0]) > 20
    assert [len(set(found)) for found in colours] == [1, 1]
    assert colours[0] != colours[1]


def test_hostile_texts_run_nothing(tab, tmp_path):
    report = read_report("reranked")
    report["details"]["samples"][0]["query"] = "<img src=x onerror='window.ran = 1'>"
    report["details"]["samples"][0]["reranked"] = "<script>window.ran = 1</script>"
    page = Path(tmp_path, "report.html")
    page.write_text(render_report("reranked", report), encoding="utf-8")
    tab.open(page, width=DESKTOP, scheme="light")
    assert tab.evaluate("window.ran === undefined")
    assert tab.requests == [page.as_uri()]
    assert tab.complaints == []

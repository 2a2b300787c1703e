import json
import logging
from types import SimpleNamespace

import pytest

from qbatch.errors import StorageError
from qbatch.report.page import render
from qbatch.report.writing import write_page, write_report
from qbatch.storage import Storage
from tests.report.samples_of_reports import read_report


@pytest.mark.parametrize("kind", ["vectors", "evaluation"])
def test_both_files_are_written(kind, tmp_path, caplog):
    storage = Storage(str(tmp_path))
    report = read_report(kind)
    details = report.pop("details", None)
    write_report(storage, kind, report, None if details is None else lambda: details)
    assert json.loads(storage.read("report.json")) == read_report(kind)
    html = storage.read("report.html").decode()
    assert html.startswith("<!doctype html>")
    assert len(html) < 300_000
    assert caplog.records == []


def test_details_that_cannot_be_read_are_left_out_with_a_warning(tmp_path, caplog):
    storage = Storage(str(tmp_path))

    def details():
        raise StorageError("the store went away")

    write_report(storage, "vectors", {"generation": 1, "rejected": {}}, details)
    assert json.loads(storage.read("report.json")) == {
        "generation": 1,
        "rejected": {},
        "details": {},
    }
    assert b"Vectors" in storage.read("report.html")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "lacks details: StorageError: the store went away" in record.getMessage()


def test_a_page_that_cannot_be_drawn_fails_nothing(tmp_path, caplog):
    storage = Storage(str(tmp_path))
    write_report(storage, "index", {"generation": 1, "search": {}}, dict)
    assert json.loads(storage.read("report.json"))["generation"] == 1
    assert not storage.exists("report.html")
    assert "no report.html of this run" in caplog.text
    assert "KeyError" in caplog.text


def test_a_template_that_does_not_fit_is_a_named_error():
    """As when the package is replaced while a job runs; ``write_page`` makes it a warning."""
    with pytest.raises(ValueError, match=r"page\.html cannot show 'Title': .* 'links'"):
        render("Title", {}, SimpleNamespace(cards=[]))


def test_a_page_that_cannot_be_stored_fails_nothing(tmp_path, caplog):
    (tmp_path / "report.html").mkdir()
    write_page(Storage(str(tmp_path)), "evaluation", read_report("evaluation"))
    assert "no report.html of this run" in caplog.text

"""Writing what a job did: report.json for programs and, beside it, report.html for people."""

import json
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from qbatch.errors import QbatchError
from qbatch.storage import Storage

if TYPE_CHECKING:
    from qbatch.report.pages import Kind

log = logging.getLogger(__name__)

_FAILURES = (
    *(QbatchError, OSError, ImportError, ValueError, TypeError, LookupError, ArithmeticError),
    *(RuntimeError, pa.ArrowException),
)
"""What may go wrong over a picture of data that is published already."""


def write_report(
    storage: Storage,
    kind: "Kind",
    summary: Mapping[str, Any],
    details: Callable[[], Mapping[str, Any]] | None = None,
) -> None:
    """Write report.json and report.html, each replacing an older one.

    Whatever fails in gathering details or drawing is logged and leaves them out: the job's data is
    published by then.

    Args:
        storage: The output of the job.
        kind: What it made.
        summary: What the job returns.
        details: Gathers more for the page, which goes into report.json as ``details``; small.

    Raises:
        StorageError: report.json cannot be written.
    """
    report = dict(summary)
    if details is not None:
        try:
            report["details"] = dict(details())
        except _FAILURES as error:
            log.warning("the report in %s lacks details: %s", storage.uri, _reason(error))
            report["details"] = {}
    storage.write("report.json", json.dumps(report, indent=1).encode())
    write_page(storage, kind, report)


def write_page(storage: Storage, kind: "Kind", report: Mapping[str, Any]) -> None:
    """Write report.html from the content of report.json, or log why there is none."""
    try:
        # matplotlib and Jinja are for the end of a job, not for whoever imports it.
        from qbatch.report.pages import render_report  # noqa: PLC0415

        storage.write("report.html", render_report(kind, report).encode("utf-8", "replace"))
    except _FAILURES as error:
        log.warning(
            "no report.html of this run in %s, one there is older: %s", storage.uri, _reason(error)
        )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"

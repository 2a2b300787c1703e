"""Reports of real runs on the quickstart corpus and on test tables, one of each kind."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from qbatch.report.pages import render_report

_DATA = Path(__file__).parent / "data"

KINDS = sorted(path.stem for path in _DATA.glob("*.json"))


def read_report(kind: str) -> dict[str, Any]:
    """Return a report.json."""
    return json.loads((_DATA / f"{kind}.json").read_text("utf-8"))


@cache
def rendered(kind: str) -> str:
    """Return the page of a report; drawn once, since that takes a second."""
    return render_report(kind, read_report(kind))

"""What was released: every release with its tables, counts and gates, and which one serves."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

from qbatch.lease import latest_lease
from qbatch.pipelines.release_gates import format_gates
from qbatch.release import Release, open_release, release_numbers
from qbatch.storage import Storage

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusConfig:
    """List releases."""

    output: str
    """Directory of the releases: the --output of reindex.py."""
    release: int | None = None
    """Show the gates of this release; None is the one that serves."""
    newest: int = 10
    """How many releases to list."""


def status(config: StatusConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        NoInputError: Nothing was released there, or not that release.
    """
    storage = Storage(config.output)
    shown = open_release(config.output, config.release)
    numbers = release_numbers(storage)
    listed = [open_release(config.output, number) for number in numbers[-config.newest :]]
    lease = latest_lease(storage)
    log.info("releases of %s\n%s", storage.uri, _format(listed))
    log.info("gates of release %d\n%s", shown.number, format_gates(_gates(shown)))
    return {
        "serving": numbers[-1],
        "working": lease.holder if lease is not None and lease.is_live else None,
        "releases": [_describe(release) for release in listed],
        "gates": _gates(shown),
    }


def _gates(release: Release) -> list[dict[str, Any]]:
    gates: list[dict[str, Any]] = release.generation.details["gates"]
    return gates


def _describe(release: Release) -> dict[str, Any]:
    generation = release.generation
    return {
        "release": release.number,
        "created": generation.created,
        "tables": {name: asdict(ref) for name, ref in release.tables.items()},
        "counts": dict(generation.counts),
        "rolled_back": len(release.withdrawn) > 0,
    }


def _format(releases: list[Release]) -> str:
    lines = []
    for release in releases:
        mark = "*" if release is releases[-1] else " "
        tables = ", ".join(f"{ref.path}@{ref.generation}" for ref in release.tables.values())
        documents = release.generation.counts["vectors"]["rows_embedded"]
        origin = " (rolled back)" if release.withdrawn else ""
        created = release.generation.created
        lines.append(f"{mark} {release.number}  {created}  {documents} documents  {tables}{origin}")
    return "\n".join(lines)

"""Releases: which generations of several tables belong together.

A release is a generation of kind "release" in the directory above the tables. It lists no files: it
names tables and their generations, so that readers who follow it never mix two states.

    release = open_release("s3://bucket/night")
    for rows in release.open("answers").iter_tables(): ...
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qbatch.errors import ConfigError, IntegrityError, NoInputError
from qbatch.manifest import (
    Generation,
    fingerprint_id,
    latest_generation,
    load_generation,
    publish_change,
)
from qbatch.schema import FILES
from qbatch.storage import Storage
from qbatch.tables import PublishedTable, open_table

log = logging.getLogger(__name__)

KIND = "release"

_MANIFEST = re.compile(r"manifests/(\d{8})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRef:
    """One table of a release."""

    path: str
    """Directory, relative to the release's."""
    generation: int

    def open(self, root: Storage) -> PublishedTable:
        """Open the table at exactly this generation."""
        return open_table(root.object_uri(self.path), self.generation)


@dataclass(frozen=True, slots=True)
class Release:
    """One published release; later ones do not change what it reads."""

    storage: Storage
    generation: Generation

    @property
    def number(self) -> int:
        """From 1; rolling back gives an older content a new number."""
        return self.generation.number

    @property
    def tables(self) -> dict[str, TableRef]:
        """Name to table: vectors, index, and what was precomputed."""
        return {name: TableRef(**ref) for name, ref in self.generation.details["tables"].items()}

    @property
    def withdrawn(self) -> list[dict[str, TableRef]]:
        """Tables of releases that were rolled back and are not to be released again as they are."""
        return [
            {name: TableRef(**ref) for name, ref in tables.items()}
            for tables in self.generation.details["withdrawn"]
        ]

    def open(self, name: str) -> PublishedTable:
        """Open one table at the generation that belongs to this release.

        Raises:
            NoInputError: The release has no such table.
        """
        if name not in self.tables:
            raise NoInputError(
                f"release {self.number} of {self.storage.uri} has no table {name!r}; it has "
                f"{', '.join(self.tables)}"
            )
        return self.tables[name].open(self.storage)


def release_numbers(storage: Storage) -> list[int]:
    """Return the numbers of all releases that are there, rising."""
    names = (_MANIFEST.fullmatch(listed.path) for listed in storage.iter_objects("manifests"))
    return sorted(int(name[1]) for name in names if name)


def latest_release(storage: Storage) -> Release | None:
    """Return the release that serves, or None before the first.

    Raises:
        ConfigError: What is published there are no releases.
    """
    found = latest_generation(storage)
    return None if found is None else _checked(storage, found)


def open_release(uri: str, number: int | None = None) -> Release:
    """Open the newest release below a directory, or a given one.

    Raises:
        NoInputError: Nothing was released, or that release is not there any more.
        ConfigError: What is published there are no releases.
    """
    storage = Storage(uri)
    if number is None:
        newest = latest_release(storage)
        if newest is None:
            raise NoInputError(f"nothing was released in {storage.uri}; run reindex.py")
        return newest
    try:
        return _checked(storage, load_generation(storage, number))
    except FileNotFoundError as error:
        raise NoInputError(
            f"there is no release {number} in {storage.uri}; it has {release_numbers(storage)}"
        ) from error


def _checked(storage: Storage, found: Generation) -> Release:
    if found.kind != KIND:
        raise ConfigError(
            f"{storage.uri} holds {found.kind}, not releases; give the --output of reindex.py"
        )
    return Release(storage, found)


def publish_release(
    storage: Storage,
    tables: Mapping[str, TableRef],
    *,
    current: Release | None,
    config: Mapping[str, Any],
    gates: list[dict[str, Any]],
    withdrawn: list[dict[str, TableRef]] | None = None,
) -> Release:
    """Publish tables that belong together, after checking that all of their files are there.

    Args:
        storage: The directory above the tables.
        tables: By name.
        current: The newest release when the writer began, None for none.
        config: Resolved settings of the job.
        gates: What was checked, as in the report.
        withdrawn: See ``Release.withdrawn``.

    Raises:
        IntegrityError: A generation or a file of one is missing.
        CommitRaceLostError: Another writer released first.
    """
    opened = {name: _whole(storage, ref) for name, ref in tables.items()}
    draft = Generation(
        kind=KIND,
        fingerprint={
            name: fingerprint_id(table.generation.fingerprint) for name, table in opened.items()
        },
        config=config,
        counts={name: dict(table.generation.counts) for name, table in opened.items()},
        files=FILES.empty_table(),
        rejects=FILES.empty_table(),
        details={
            "tables": _as_details(tables),
            "gates": gates,
            "withdrawn": [_as_details(refs) for refs in withdrawn or []],
        },
    )
    return Release(storage, publish_change(storage, draft, current.generation if current else None))


def _as_details(tables: Mapping[str, TableRef]) -> dict[str, Any]:
    return {name: asdict(ref) for name, ref in sorted(tables.items())}


def _whole(storage: Storage, ref: TableRef) -> PublishedTable:
    """Return a table of which every listed file is there in its full size."""
    try:
        table = ref.open(storage)
    except FileNotFoundError as error:
        raise IntegrityError(
            f"{storage.object_uri(ref.path)} has no generation {ref.generation}; nothing was "
            "released. Run the night again"
        ) from error
    generation = table.generation
    wanted = {
        entry["path"]: entry["bytes"]
        for files in (generation.files, generation.rejects)
        for entry in files.to_pylist()
    }
    for directory in sorted({path.partition("/")[0] for path in wanted}):
        for listed in table.storage.iter_objects(directory):
            if wanted.get(listed.path) == listed.size:
                del wanted[listed.path]
    if wanted:
        raise IntegrityError(
            f"generation {ref.generation} of {table.storage.uri} lacks {len(wanted)} of its files, "
            f"the first is {min(wanted)}; nothing was released. Run the night again to remake them"
        )
    return table


def roll_back(storage: Storage, number: int, *, config: Mapping[str, Any]) -> Release:
    """Publish the content of an older release as a new one.

    What served until now is marked as withdrawn: a night that finds nothing new leaves it at that.

    Raises:
        NoInputError: There is no such release.
        IntegrityError: Its tables are not whole any more.
        CommitRaceLostError: A night released meanwhile.
    """
    current, target = open_release(storage.uri), open_release(storage.uri, number)
    if target.tables == current.tables:
        log.info("release %d serves the content of release %d already", current.number, number)
        return current
    withdrawn = [tables for tables in current.withdrawn if tables != target.tables]
    return publish_release(
        storage,
        target.tables,
        current=current,
        config=config,
        gates=target.generation.details["gates"],
        withdrawn=[*withdrawn, current.tables],
    )

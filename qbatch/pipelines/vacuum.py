"""The vacuum: what no kept release needs, and nobody can be working on, is removed.

Kept are the newest releases, every generation they name and those that these rest on, the newest
generation of every table, since the next night starts from it, and whatever is young. Manifests go
before the files they list, so that a vacuum that dies leaves no list of files that are gone.
"""

import json
import logging
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qbatch.errors import ConfigError
from qbatch.lease import hold_lease
from qbatch.manifest import load_generation
from qbatch.pipelines.kept_files import iter_entries, iter_table_refs, referenced_files
from qbatch.release import KIND, open_release
from qbatch.storage import ObjectInfo, Storage

log = logging.getLogger(__name__)

_MANIFEST = re.compile(r"(?:(.+)/)?manifests/(\d{8})\.json")
_OWN = re.compile(r"model-[0-9a-f]{8}/|manifests/|leases/|\.probe/")
"""Directories that only nights write to; anything else is the user's."""

_STAYS = re.compile(r"(?:.+/)?(?:report\.(?:json|html)|calibrations/[^/]+)")
"""Small, not listed anywhere, and missed when gone: int8 has one calibration a table."""

_TRAINING = re.compile(r"(.+)/training/[^/]+\.json")

_LEASE_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class VacuumConfig:
    """Remove what no kept release needs."""

    output: str
    """Directory of the releases: the --output of reindex.py."""
    keep: int = 3
    """How many of the newest releases are kept with everything they need."""
    min_age_hours: float = 72.0
    """Younger objects stay: a job may be about to list them, a reader about to open them."""
    drop_unreleased_models: bool = False
    """Remove the tables of models that no kept release names, unless something in them is young."""
    dry_run: bool = False
    """Count what would go; remove nothing."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ConfigError(f"keep is {self.keep}; give 1 or more: the newest release serves")
        if self.min_age_hours < 0:
            raise ConfigError(f"min_age_hours is {self.min_age_hours}; give 0 or more")


def vacuum(config: VacuumConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        NoInputError: Nothing was released there.
        LeaseHeldError: A night is running.
        IntegrityError: What a kept generation lists cannot be read; nothing was removed.
    """
    storage = Storage(config.output)
    open_release(config.output)
    if config.dry_run:
        return _Vacuum.plan(storage, config).summary()
    holder = f"vacuum on {socket.gethostname()}, process {os.getpid()}"
    with hold_lease(storage, holder=holder, lease_s=_LEASE_S):
        planned = _Vacuum.plan(storage, config)
        for paths in planned.batches():
            storage.delete_all(paths)
    log.info("removed %d objects, %d bytes", planned.num_objects, planned.num_bytes)
    return planned.summary()


@dataclass(slots=True)
class _Table:
    """The generations of one table, by what the listing shows."""

    numbers: dict[int, bool] = field(default_factory=dict)
    """Number to whether its manifest is young."""
    kept: set[int] = field(default_factory=set)


@dataclass(slots=True, kw_only=True)
class _Vacuum:
    """What stays, and what goes in which order."""

    storage: Storage
    config: VacuumConfig
    cutoff: float
    """Seconds since 1970; what was written later stays."""
    tables: dict[str, _Table] = field(default_factory=dict)
    """By directory, "" for the releases."""
    newest_lease: str = ""
    files: set[str] = field(default_factory=set)
    """Paths that kept generations need."""
    stages: tuple[list[str], list[str], list[str]] = field(default_factory=lambda: ([], [], []))
    """Manifests, then records of training, then the rest."""
    directories: Counter[str] = field(default_factory=Counter)
    """Bytes that go, by directory."""
    num_bytes: int = 0

    @classmethod
    def plan(cls, storage: Storage, config: VacuumConfig) -> "_Vacuum":
        """Find out what stays and what goes."""
        planned = cls(
            storage=storage, config=config, cutoff=time.time() - 3600 * config.min_age_hours
        )
        planned.find_tables()
        planned.keep_generations()
        planned.collect_garbage()
        return planned

    @property
    def num_objects(self) -> int:
        """Objects that go."""
        return sum(map(len, self.stages))

    def batches(self) -> Iterator[list[str]]:
        """Yield what goes, in an order that leaves no manifest of files that are gone."""
        yield from (stage for stage in self.stages if stage)

    def summary(self) -> dict[str, Any]:
        """Return what went, or would go."""
        return {
            "objects": self.num_objects,
            "bytes": self.num_bytes,
            "bytes_by_directory": dict(sorted(self.directories.items())),
            "releases": sorted(self.tables[""].kept),
            "generations": {
                name: sorted(table.kept) for name, table in sorted(self.tables.items()) if name
            },
            "dry_run": self.config.dry_run,
        }

    def find_tables(self) -> None:
        """Note every table and its generations."""
        for listed in self.storage.iter_objects():
            if _OWN.match(listed.path) and (name := _MANIFEST.fullmatch(listed.path)):
                table = self.tables.setdefault(name[1] or "", _Table())
                table.numbers[int(name[2])] = self.is_young(listed)
            if listed.path.startswith("leases/"):
                self.newest_lease = listed.path

    def is_young(self, listed: ObjectInfo) -> bool:
        """Tell whether an object was written lately, or may have been."""
        return listed.modified is None or listed.modified >= self.cutoff

    def keep_generations(self) -> None:
        """Start from releases and newest generations, and follow what they name."""
        releases = self.tables[""].numbers
        for number in sorted(releases)[-self.config.keep :]:
            self.keep("", number)
        for name, table in self.tables.items():
            for number, is_young in table.numbers.items():
                if is_young:
                    self.keep(name, number)
        for name, table in self.tables.items():
            if not self.config.drop_unreleased_models or self.is_kept_model(name):
                self.keep(name, max(table.numbers))

    def is_kept_model(self, path: str) -> bool:
        """Tell whether some generation below the same model's directory is kept."""
        model = path.partition("/")[0]
        return any(
            table.kept for other, table in self.tables.items() if other.partition("/")[0] == model
        )

    def keep(self, name: str, number: int) -> None:
        """Keep a generation with its files, and the generations that it names."""
        table = self.tables.get(name)
        if table is None or number not in table.numbers or number in table.kept:
            return
        table.kept.add(number)
        storage = Storage(self.storage.object_uri(name))
        load_generation(storage, number)  # a damaged one ends the vacuum before anything goes
        manifest = json.loads(storage.read(f"manifests/{number:08d}.json"))
        named = [(ref["path"], ref["generation"]) for ref in _released(manifest)]
        for uri, generation in iter_table_refs(manifest["details"]):
            inside = self.inside(uri)
            if inside is not None:
                named.append((inside, generation))
        # An index lists vectors files that even the generation it was built from may not list.
        owners = {name, *(other for other, _ in named)}
        for path in referenced_files(storage, manifest):
            self.files.update(f"{owner}/{path}".lstrip("/") for owner in owners)
        for other, generation in named:
            self.keep(other, generation)

    def inside(self, uri: str) -> str | None:
        """Return the directory of a table relative to the releases, None when it lies elsewhere."""
        root = f"{self.storage.uri.rstrip('/')}/"
        full = f"{Storage(uri).uri.rstrip('/')}/"
        return full.removeprefix(root).rstrip("/") if full.startswith(root) else None

    def collect_garbage(self) -> None:
        """Note what goes."""
        for listed in self.storage.iter_objects():
            if _OWN.match(listed.path) and not self.stays(listed):
                self.add(listed.path, listed.size)

    def stays(self, listed: ObjectInfo) -> bool:
        """Tell whether an object is needed, or young."""
        path = listed.path
        if self.is_young(listed) or path in self.files or path == self.newest_lease:
            return True
        if name := _MANIFEST.fullmatch(path):
            return int(name[2]) in self.tables[name[1] or ""].kept
        if _STAYS.fullmatch(path):
            return self.is_kept_model(path)
        if record := _TRAINING.fullmatch(path):
            # It stands for files: where they stay it stays, and it goes before they go.
            entries = iter_entries(json.loads(self.storage.read(path)))
            return all(f"{record[1]}/{entry['path']}" in self.files for entry in entries)
        return False

    def add(self, path: str, size: int) -> None:
        """Note an object that goes."""
        stage = 0 if _MANIFEST.fullmatch(path) else 1 if _TRAINING.fullmatch(path) else 2
        self.stages[stage].append(path)
        self.num_bytes += size
        self.directories[path.rpartition("/")[0]] += size


def _released(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tables that a release names, none of any other generation."""
    return list(manifest["details"]["tables"].values()) if manifest["kind"] == KIND else []

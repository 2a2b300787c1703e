"""Generations: immutable, create-only lists of the files that count.

A generation is ``manifests/<8 digits>.json``. It is written last and never changed; readers take
the highest and read only what it lists. Of two writers of one generation, one wins and the other
gets CommitRaceLostError; nothing is deleted on the way.
"""

import hashlib
import json
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.errors import CommitRaceLostError, IntegrityError, ObjectExistsError, StorageError
from qbatch.schema import FILES
from qbatch.storage import Storage

log = logging.getLogger(__name__)

_DIRECTORY = "manifests"
_NAME = re.compile(r"manifests/(\d{8})\.json")
_MAX_INLINE_FILES = 10_000
"""Longer lists move to Parquet beside the manifest, which stays small enough to read in one go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One published, or about to be published, state of a table."""

    kind: str
    """What the table holds: vectors, index, run ..."""
    fingerprint: Mapping[str, Any]
    """Everything that changes the content; tables with different fingerprints do not meet."""
    config: Mapping[str, Any]
    """The resolved settings of the job that made it."""
    counts: Mapping[str, Any]
    """Rows in, out and rejected, and whatever else the job conserves."""
    files: pa.Table
    """schema.FILES, ordered by path."""
    rejects: pa.Table
    """schema.FILES of the reject files, ordered by path."""
    plan: Mapping[str, Any] | None = None
    """The one file, as in ``files``, that lists the units of work."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What readers need to know besides: how to search an index, how good it is."""
    single_writer: bool = False
    """The operator vouched for being the only writer, on a store without conditional PUT."""
    number: int = 0
    """From 1; 0 before publication."""
    nonce: str = ""
    """Names the writer, so that it can recognise its own manifest after an unclear answer."""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def has_content_of(self, other: "Generation") -> bool:
        """Tell whether both list the same files made from the same plan and settings."""
        return (
            self.fingerprint == other.fingerprint
            and self.files.equals(other.files)
            and self.rejects.equals(other.rejects)
            and self.plan == other.plan
            and self.details == other.details
        )


def canonical_json(value: object) -> bytes:
    """Encode for hashing: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def fingerprint_id(fields: Mapping[str, Any]) -> str:
    """Return the 32 hex digits that stand for a fingerprint in names and keys."""
    return hashlib.sha256(canonical_json(dict(fields))).hexdigest()[:32]


def file_entry(path: str, rows: int, data: bytes | memoryview) -> dict[str, Any]:
    """Return the schema.FILES entry of one file's content."""
    digest = hashlib.sha256(data).hexdigest()
    return {"path": path, "rows": rows, "bytes": len(data), "sha256": digest}


def latest_generation(storage: Storage) -> Generation | None:
    """Return the highest published generation, or None when nothing was published yet.

    Raises:
        IntegrityError: The manifest or a list it names is damaged.
    """
    numbers = [
        int(m[1]) for o in storage.iter_objects(_DIRECTORY) if (m := _NAME.fullmatch(o.path))
    ]
    return load_generation(storage, max(numbers)) if numbers else None


def load_generation(storage: Storage, number: int) -> Generation:
    """Return one published generation.

    Raises:
        FileNotFoundError: There is no such generation.
        IntegrityError: The manifest or a list it names is damaged.
    """
    path = _manifest_path(number)
    try:
        return _decode(storage, json.loads(storage.read(path)))
    except (KeyError, TypeError, ValueError, RecursionError, pa.ArrowInvalid) as error:
        raise IntegrityError(
            f"{storage.object_uri(path)} is not a manifest ({type(error).__name__}: {error}). "
            "Restore it from a backup, or publish an older generation again"
        ) from error


def publish(storage: Storage, draft: Generation, *, after: int) -> Generation:
    """Publish a draft as generation ``after + 1``; all files it lists must exist already.

    Args:
        storage: The table.
        draft: What to publish; ``number``, ``nonce`` and ``single_writer`` are set here.
        after: The highest generation when the writer began, 0 for none.

    Raises:
        CommitRaceLostError: Another writer published that generation first.
        StorageError: The store failed and the manifest is not there.
    """
    nonce = secrets.token_hex(16)
    generation = replace(draft, number=after + 1, nonce=nonce, single_writer=storage.single_writer)
    path = _manifest_path(generation.number)
    data = json.dumps(_encode(storage, generation), indent=1).encode()
    failure: Exception | None = None
    try:
        storage.create(path, data)
    except (ObjectExistsError, StorageError) as error:
        failure = error  # a retry of our own PUT can meet our own manifest: read it back
    _confirm_own(storage, generation, failure)
    return generation


def publish_change(storage: Storage, draft: Generation, current: Generation | None) -> Generation:
    """Publish a draft after the newest generation, unless that has the same content already."""
    if current is not None and draft.has_content_of(current):
        log.info("nothing changed: generation %d stays the newest", current.number)
        return current
    published = publish(storage, draft, after=current.number if current else 0)
    log.info("published generation %d: %s", published.number, storage.uri)
    return published


def _confirm_own(storage: Storage, generation: Generation, failure: Exception | None) -> None:
    path = _manifest_path(generation.number)
    try:
        nonce = json.loads(storage.read(path)).get("nonce")
    except FileNotFoundError:
        raise failure or StorageError(f"{storage.object_uri(path)} is gone after writing") from None
    if nonce != generation.nonce:
        raise CommitRaceLostError(
            f"generation {generation.number} of {storage.uri} was published by another writer "
            f"(nonce {nonce}, ours {generation.nonce}); nothing of theirs was touched. Run again: "
            "finished units are reused"
        ) from failure


def _manifest_path(number: int) -> str:
    return f"{_DIRECTORY}/{number:08d}.json"


def _encode(storage: Storage, generation: Generation) -> dict[str, Any]:
    return {
        "generation": generation.number,
        "nonce": generation.nonce,
        "kind": generation.kind,
        "created": generation.created,
        "single_writer": generation.single_writer,
        "fingerprint": dict(generation.fingerprint),
        "config": dict(generation.config),
        "counts": dict(generation.counts),
        "details": dict(generation.details),
        "plan": generation.plan,
        "files": _encode_list(storage, generation, "files"),
        "rejects": _encode_list(storage, generation, "rejects"),
    }


def _encode_list(
    storage: Storage, generation: Generation, name: str
) -> list[dict[str, Any]] | dict[str, Any]:
    entries: pa.Table = getattr(generation, name)
    if entries.num_rows <= _MAX_INLINE_FILES:
        inline: list[dict[str, Any]] = entries.to_pylist()
        return inline
    sink = pa.BufferOutputStream()
    pq.write_table(entries, sink)
    data = sink.getvalue().to_pybytes()
    path = f"{_DIRECTORY}/{generation.number:08d}-{generation.nonce}-{name}.parquet"
    storage.write(path, data)
    return file_entry(path, entries.num_rows, data)


def _decode(storage: Storage, document: dict[str, Any]) -> Generation:
    return Generation(
        kind=document["kind"],
        fingerprint=document["fingerprint"],
        config=document["config"],
        counts=document["counts"],
        details=document["details"],
        files=_decode_list(storage, document["files"]),
        rejects=_decode_list(storage, document["rejects"]),
        plan=document["plan"],
        single_writer=document["single_writer"],
        number=document["generation"],
        nonce=document["nonce"],
        created=document["created"],
    )


def _decode_list(storage: Storage, entries: list[dict[str, Any]] | dict[str, Any]) -> pa.Table:
    if isinstance(entries, dict):
        data = read_verified(storage, entries)
        table = pq.read_table(pa.BufferReader(data), schema=FILES)
    else:
        table = pa.Table.from_pylist(entries, schema=FILES)
    for path in table["path"].to_pylist():
        _check_inside(path)
    return table


def read_verified(storage: Storage, entry: Mapping[str, Any]) -> pa.Buffer:
    """Return the content of a listed file after checking it against its sha256.

    Raises:
        IntegrityError: The file is missing or its bytes are not those that were published.
    """
    path = entry["path"]
    _check_inside(path)
    try:
        data = storage.read_buffer(path)
    except FileNotFoundError as error:
        raise IntegrityError(
            f"{storage.object_uri(path)} is listed in a manifest but gone"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != entry["sha256"]:
        raise IntegrityError(
            f"{storage.object_uri(path)} has sha256 {found}, its manifest says {entry['sha256']}: "
            "it was damaged or replaced. Delete it and run the job again to remake it"
        )
    return data


def _check_inside(path: object) -> None:
    if not isinstance(path, str):
        raise TypeError(f"path {path!r} is no text")
    if path.startswith("/") or ".." in path.split("/") or "://" in path:
        raise ValueError(f"path {path!r} leaves the table")

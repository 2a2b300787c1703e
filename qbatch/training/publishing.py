"""Model directories that appear whole: their last file lists all others and is written once."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qbatch.errors import IntegrityError
from qbatch.storage import Storage

COMPLETE = "complete.json"
"""A directory counts once this file is there."""


@contextmanager
def workspace(storage: Storage) -> Iterator[Path]:
    """Give a temporary folder, on the disk of the output where that is a disk."""
    root = Path(storage.root) if storage.scheme == "file" else None
    if root is not None:
        root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as folder:
        yield Path(folder)


def publish_directory(
    folder: Path, storage: Storage, prefix: str, facts: Mapping[str, Any]
) -> None:
    """Move a folder's files into storage; the list that makes them count comes last.

    Args:
        folder: Local; its files are gone afterwards.
        storage: Where to.
        prefix: Directory in it; "" is the storage itself.
        facts: What else the list tells: what the directory was made from.

    Raises:
        ObjectExistsError: Another process completed the directory first.
    """
    files = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        path = file.relative_to(folder).as_posix()
        files.append({"path": path, "bytes": file.stat().st_size, "sha256": digest})
        storage.upload(_inside(prefix, path), file)
        file.unlink()
    content = json.dumps({**facts, "files": files}, indent=1)
    storage.create(_inside(prefix, COMPLETE), content.encode())


def read_complete(storage: Storage, prefix: str = "") -> dict[str, Any] | None:
    """Return the facts and files of a directory, or None if it is not complete.

    Raises:
        IntegrityError: The list is damaged.
    """
    path = _inside(prefix, COMPLETE)
    if not storage.exists(path):
        return None
    try:
        facts: dict[str, Any] = json.loads(storage.read(path))
    except ValueError as error:
        raise IntegrityError(
            f"{storage.object_uri(path)} is damaged: {error}. Delete its directory and run again"
        ) from error
    return facts


def delete_directory(storage: Storage, prefix: str) -> None:
    """Remove a directory: first the list, so that no half of it counts."""
    storage.delete(_inside(prefix, COMPLETE))
    for info in list(storage.iter_objects(prefix)):
        storage.delete(info.path)


def _inside(prefix: str, path: str) -> str:
    return f"{prefix}/{path}" if prefix else path

"""Object storage and local disks behind a handful of operations with exact promises.

A file appears whole or not at all: one PUT on object stores, write-then-rename on a disk.
``create`` never replaces. Listings come in name order and are never held in memory. Every failure
of the store is a StorageError that names the object. Each process finds its credentials by itself;
they are never passed around.
"""

import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import fsspec
import pyarrow as pa
from botocore.exceptions import BotoCoreError

from qbatch.errors import ConfigError, ObjectExistsError, StorageError

SCHEMES = ("file", "s3", "gs", "hf")
"""What a URI may start with; http stays out, so that no input reaches internal services."""

_READ_AHEAD_BYTES = 8 * 2**20
"""Less than s3fs's own 50 MiB: spans of an object are read by different processes."""

_COPY_BYTES = 2**20

_DELETES_PER_REQUEST = 1000
"""The most that S3 takes."""

_STORE_ERRORS = (OSError, BotoCoreError)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object."""

    uri: str
    path: str
    """Relative to the storage it was listed from."""
    size: int
    """Bytes."""
    version: str
    """ETag, or the modification time in nanoseconds on a disk: changes when the content does."""
    modified: float | None = None
    """When it was written, in seconds since 1970; None where the store does not say."""


class Storage:
    """One directory of an object store or a disk; cheap to make and to send to a process."""

    def __init__(self, uri: str, *, single_writer: bool = False) -> None:
        """Name a directory; nothing is opened yet.

        Args:
            uri: Local path, or a URI of one of SCHEMES.
            single_writer: The operator promises that no other process creates objects here, which
                makes ``create`` work on stores without conditional PUT.
        """
        self.single_writer = single_writer
        self.scheme, self.root = split_uri(uri)
        self.uri = f"{self.scheme}://{self.root}" if self.scheme != "file" else self.root

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_backend"}  # has open connections

    @cached_property
    def _backend(self) -> "_Backend":
        return _LocalBackend() if self.scheme == "file" else _FsspecBackend(self.scheme)

    def _absolute(self, path: str) -> str:
        return f"{self.root.rstrip('/')}/{path}" if path else self.root

    def object_uri(self, path: str) -> str:
        """Return the full URI of a path inside this storage."""
        absolute = self._absolute(path)
        return absolute if self.scheme == "file" else f"{self.scheme}://{absolute}"

    def read(self, path: str) -> bytes:
        """Return the content of an object; FileNotFoundError when absent."""
        with _named_errors("read", self.object_uri(path)):
            return self._backend.read(self._absolute(path))

    def read_buffer(self, path: str) -> pa.Buffer:
        """Return the content of a large object in Arrow's memory; FileNotFoundError when absent."""
        with _named_errors("read", self.object_uri(path)):
            return self._backend.read_buffer(self._absolute(path))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Return some bytes of an object in one request; FileNotFoundError when absent."""
        with _named_errors("read", self.object_uri(path)):
            return self._backend.read_range(self._absolute(path), start, stop)

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Make an object appear whole, replacing an older one of the same name."""
        with _named_errors("write", self.object_uri(path)):
            self._backend.write(self._absolute(path), data)

    def upload(self, path: str, file: Path) -> None:
        """Make the content of a local file appear whole as an object, replacing an older one."""
        with _named_errors("write", self.object_uri(path)):
            self._backend.upload(self._absolute(path), file)

    def download(self, path: str, file: Path) -> None:
        """Copy an object to a local file; FileNotFoundError when absent."""
        with _named_errors("read", self.object_uri(path)):
            self._backend.download(self._absolute(path), file)

    def create(self, path: str, data: bytes) -> None:
        """Make an object appear whole, only if there is none of that name.

        Raises:
            ObjectExistsError: An object of that name is there.
            StorageError: The store failed; whether the object was written is unknown.
        """
        with _named_errors("create", self.object_uri(path)):
            try:
                if self.single_writer:
                    self._create_alone(path, data)
                else:
                    self._backend.create(self._absolute(path), data)
            except FileExistsError as error:
                raise ObjectExistsError(f"{self.object_uri(path)} exists already") from error

    def _create_alone(self, path: str, data: bytes) -> None:
        if self._backend.exists(self._absolute(path)):
            raise FileExistsError(path)
        self._backend.write(self._absolute(path), data)

    def open(self, path: str) -> BinaryIO:
        """Open an object for random-access reading; FileNotFoundError when absent."""
        with _named_errors("open", self.object_uri(path)):
            return self._backend.open(self._absolute(path))

    def info(self, path: str) -> ObjectInfo:
        """Return size and version of one object; FileNotFoundError when absent."""
        with _named_errors("stat", self.object_uri(path)):
            facts = self._backend.info(self._absolute(path))
        return ObjectInfo(self.object_uri(path), path, *facts)

    def exists(self, path: str) -> bool:
        """Tell whether there is an object of that name."""
        with _named_errors("look for", self.object_uri(path)):
            return self._backend.exists(self._absolute(path))

    def delete(self, path: str) -> None:
        """Remove one object; an absent one is no error."""
        with _named_errors("delete", self.object_uri(path)):
            self._backend.delete(self._absolute(path))

    def delete_all(self, paths: Sequence[str]) -> None:
        """Remove objects, up to 1,000 in a request; absent ones are no error."""
        for start in range(0, len(paths), _DELETES_PER_REQUEST):
            batch = paths[start : start + _DELETES_PER_REQUEST]
            with _named_errors(f"delete {len(batch)} objects from", self.object_uri(batch[0])):
                self._backend.delete_all([self._absolute(path) for path in batch])

    def iter_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield every object under a directory, recursively, in name order.

        Args:
            prefix: A directory in this storage; "" is all of it. An absent one yields nothing.
        """
        base = self._absolute(prefix).rstrip("/")
        with _named_errors("list", self.object_uri(prefix)):
            for absolute, facts in self._backend.iter_objects(base):
                path = absolute[len(self.root.rstrip("/")) + 1 :]
                yield ObjectInfo(self.object_uri(path), path, *facts)


def split_uri(uri: str) -> tuple[str, str]:
    """Return scheme and path of a URI or local path; local paths become absolute.

    Raises:
        ConfigError: The scheme is not allowed, or the URI holds credentials, a query or "..".
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return "file", str(Path(uri).expanduser().absolute())
    if scheme not in SCHEMES:
        raise ConfigError(
            f"unknown storage scheme {scheme!r} in {redact(uri)!r}; use one of {SCHEMES}"
        )
    if "@" in rest.split("/", 1)[0]:
        raise ConfigError(
            f"credentials inside the URI {redact(uri)!r}; give them through the environment, "
            "a mounted file or a service account instead"
        )
    if ".." in rest.split("/"):
        raise ConfigError(f"'..' inside the URI {uri!r}; write the path it means")
    if scheme == "file":
        return "file", str(Path(rest))
    if not rest.strip("/"):
        raise ConfigError(f"the URI {uri!r} names no bucket; write {scheme}://bucket/prefix")
    return scheme, rest.rstrip("/")


def redact(uri: str) -> str:
    """Return a URI without the user:password part, fit for logs and messages."""
    return re.sub(r"://[^/@]*@", "://***@", uri)


def parent_of(uri: str) -> tuple[Storage, str]:
    """Return the directory of an object, and its name there."""
    head, _, name = Storage(uri).uri.rstrip("/").rpartition("/")
    return Storage(head or "/"), name


def open_object(uri: str) -> BinaryIO:
    """Open one object by its full URI for random-access reading."""
    storage, name = parent_of(uri)
    return storage.open(name)


def read_object(uri: str) -> bytes:
    """Return the content of one object by its full URI; FileNotFoundError when absent."""
    storage, name = parent_of(uri)
    return storage.read(name)


def object_info(uri: str) -> ObjectInfo:
    """Return size and version of one object by its full URI; FileNotFoundError when absent."""
    storage, name = parent_of(uri)
    return storage.info(name)


def probe(storage: Storage) -> None:
    """Refuse a store that cannot be written, or that would let two writers overwrite each other.

    Raises:
        StorageError: The store is unusable; the message says why and what to do.
    """
    name = f".probe/{secrets.token_hex(8)}"
    try:
        _probe_create_only(storage, name)
    finally:
        storage.delete(name)


def _probe_create_only(storage: Storage, name: str) -> None:
    remedy = (
        "Two jobs could overwrite each other's generation here. Use a store with conditional PUT "
        "(If-None-Match), or promise with --single-writer that this job is the only writer"
    )
    try:
        storage.create(name, b"first")
    except StorageError as error:
        storage.write(name, b"first")  # tells "cannot write at all" from "cannot create-only"
        raise StorageError(f"{storage.uri} refuses conditional PUT ({error}). {remedy}") from error
    try:
        storage.create(name, b"second")
    except ObjectExistsError:
        return
    raise StorageError(f"{storage.uri} ignores conditional PUT and overwrote an object. {remedy}")


@contextmanager
def _named_errors(action: str, uri: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except (NotADirectoryError, IsADirectoryError) as error:
        raise FileNotFoundError(uri) from error
    except _STORE_ERRORS as error:
        raise StorageError(
            f"cannot {action} {uri}: {type(error).__name__}: {error}. Check that the endpoint "
            "answers and that the credentials this process finds may do this"
        ) from error


_Facts = tuple[int, str, float | None]
"""Size, version and modification time of an object."""


class _Backend(Protocol):
    """The operations on absolute paths that differ between a disk and an object store."""

    def read(self, path: str) -> bytes: ...
    def read_buffer(self, path: str) -> pa.Buffer: ...
    def read_range(self, path: str, start: int, stop: int) -> bytes: ...
    def write(self, path: str, data: bytes | memoryview) -> None: ...
    def upload(self, path: str, file: Path) -> None: ...
    def download(self, path: str, file: Path) -> None: ...
    def create(self, path: str, data: bytes) -> None: ...
    def open(self, path: str) -> BinaryIO: ...
    def info(self, path: str) -> _Facts: ...
    def exists(self, path: str) -> bool: ...
    def delete(self, path: str) -> None: ...
    def delete_all(self, paths: Sequence[str]) -> None: ...
    def iter_objects(self, base: str) -> Iterator[tuple[str, _Facts]]: ...


class _LocalBackend:
    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def read_buffer(self, path: str) -> pa.Buffer:
        # Python's own bytes come from fresh pages each time, which took 7 times as long.
        with pa.OSFile(path) as file:
            return file.read_buffer()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def write(self, path: str, data: bytes | memoryview) -> None:
        self._appear(path, io.BytesIO(data))

    def upload(self, path: str, file: Path) -> None:
        with open(file, "rb") as source:
            self._appear(path, source)

    def download(self, path: str, file: Path) -> None:
        shutil.copyfile(path, file)

    def _appear(self, path: str, source: BinaryIO) -> None:
        os.replace(self._write_temporary(path, source), path)
        _sync_directory(path)

    def create(self, path: str, data: bytes) -> None:
        temporary = self._write_temporary(path, io.BytesIO(data))
        try:
            os.link(temporary, path)  # fails when the target exists, unlike rename
        finally:
            os.unlink(temporary)
        _sync_directory(path)

    def _write_temporary(self, path: str, source: BinaryIO) -> str:
        directory, name = os.path.split(path)
        os.makedirs(directory, exist_ok=True)
        temporary = f"{directory}/.{name}.{secrets.token_hex(4)}.tmp"
        with open(temporary, "xb") as file:
            shutil.copyfileobj(source, file, _COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())
        return temporary

    def open(self, path: str) -> BinaryIO:
        return open(path, "rb")

    def info(self, path: str) -> _Facts:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(f"{path} is not a file")
        return status.st_size, str(status.st_mtime_ns), status.st_mtime

    def exists(self, path: str) -> bool:
        return os.path.isfile(path)

    def delete(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)

    def delete_all(self, paths: Sequence[str]) -> None:
        for path in paths:
            self.delete(path)

    def iter_objects(self, base: str) -> Iterator[tuple[str, _Facts]]:
        if not os.path.isdir(base):
            return
        with os.scandir(base) as scan:
            # A directory sorts as its objects do in a store: with the slash after its name.
            entries = sorted(scan, key=lambda e: e.name + "/" if e.is_dir() else e.name)
        for entry in entries:
            if entry.is_dir():
                yield from self.iter_objects(entry.path)
            elif not entry.name.endswith(".tmp") or not entry.name.startswith("."):
                status = entry.stat()
                facts = status.st_size, str(status.st_mtime_ns), status.st_mtime
                yield entry.path, facts


def _sync_directory(path: str) -> None:
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)  # without it a power loss can forget the rename
    finally:
        os.close(descriptor)


class _FsspecBackend:
    def __init__(self, scheme: str) -> None:
        self._scheme = scheme
        try:
            self._fs: Any = fsspec.filesystem(scheme, use_listings_cache=False)
        except ImportError as error:
            raise ConfigError(
                f"{scheme}:// needs a package that is not installed: {error}"
            ) from error

    def read(self, path: str) -> bytes:
        return cast("bytes", self._fs.cat_file(path))

    def read_buffer(self, path: str) -> pa.Buffer:
        return pa.py_buffer(self.read(path))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        if start == stop:  # an empty range means the whole object to HTTP
            return b""
        return cast("bytes", self._fs.cat_file(path, start=start, end=stop))

    def write(self, path: str, data: bytes | memoryview) -> None:
        self._fs.pipe_file(path, bytes(data))

    def upload(self, path: str, file: Path) -> None:
        self._fs.put_file(str(file), path)

    def download(self, path: str, file: Path) -> None:
        self._fs.get_file(path, str(file))

    def create(self, path: str, data: bytes) -> None:
        if not data:  # an empty create over an existing object raises nothing in s3fs
            raise ValueError(f"create-only needs at least one byte of content for {path}")
        self._fs.pipe_file(path, data, mode="create")

    def open(self, path: str) -> BinaryIO:
        return cast("BinaryIO", self._fs.open(path, "rb", block_size=_READ_AHEAD_BYTES))

    def info(self, path: str) -> _Facts:
        entry = self._fs.info(path)
        if entry["type"] != "file":
            raise FileNotFoundError(path)
        return int(entry["size"]), _entry_version(entry), _entry_modified(entry)

    def exists(self, path: str) -> bool:
        if self._scheme != "s3":
            return bool(self._fs.isfile(path))
        # A LIST and no HEAD: some stores answer a HEAD of nothing with broken HTTP.
        bucket, _, key = path.partition("/")
        page = self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
        return any(entry["Key"] == key for entry in page.get("Contents", ()))

    def delete(self, path: str) -> None:
        try:
            self._fs.rm_file(path)
        except FileNotFoundError:
            return

    def delete_all(self, paths: Sequence[str]) -> None:
        if self._scheme != "s3":
            for path in paths:
                self.delete(path)
            return
        bucket = paths[0].partition("/")[0]
        keys = [{"Key": path.partition("/")[2]} for path in paths]
        answer = self._fs.call_s3(
            "delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True}
        )
        if failed := answer.get("Errors"):
            raise OSError(f"{len(failed)} of {len(keys)} were refused, the first: {failed[0]}")

    def iter_objects(self, base: str) -> Iterator[tuple[str, _Facts]]:
        if self._scheme == "s3":
            yield from self._iter_s3_pages(base)
            return
        for path, entry in sorted(self._fs.find(base, detail=True).items()):
            yield path, (int(entry["size"]), _entry_version(entry), _entry_modified(entry))

    def _iter_s3_pages(self, base: str) -> Iterator[tuple[str, _Facts]]:
        # s3fs.find would hold the whole listing; pages keep a million objects flat in memory.
        bucket, _, prefix = base.partition("/")
        request = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
        while True:
            page = self._fs.call_s3("list_objects_v2", **request)
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):
                    facts = int(entry["Size"]), entry["ETag"].strip('"'), _entry_modified(entry)
                    yield f"{bucket}/{entry['Key']}", facts
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]


def _entry_version(entry: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "updated"):
        if entry.get(key) is not None:
            return str(entry[key]).strip('"')
    raise StorageError(
        f"{entry['name']} has neither an ETag nor a modification time; "
        "changes to it could not be noticed. Copy the corpus to a store that reports one of them"
    )


def _entry_modified(entry: dict[str, Any]) -> float | None:
    for key in ("LastModified", "mtime", "updated"):
        value = entry.get(key)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if value is not None:
            return value.timestamp() if isinstance(value, datetime) else float(value)
    return None

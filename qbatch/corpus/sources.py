"""Opened input objects: checked against the plan, and safe to hand to a parser."""

import io
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

from qbatch.corpus.spans import Span
from qbatch.errors import SourceChangedError, StorageError
from qbatch.manifest import read_verified
from qbatch.storage import Storage, object_info, open_object, parent_of

_FETCH_WHOLE_BYTES = 8 * 2**20
"""Objects up to this size are fetched ahead of the parser, whole."""

_FETCH_THREADS = 16

_LISTED = "sha256:"
"""Begins the version of a file that a manifest lists."""


@dataclass(frozen=True, slots=True)
class Source:
    """A span and the open object it lies in."""

    span: Span
    file: BinaryIO

    @property
    def name(self) -> str:
        """Last part of the object's URI."""
        return self.span.uri.rpartition("/")[2]


def listed_span(storage: Storage, entry: Mapping[str, Any]) -> Span:
    """Return the whole of a file that a manifest lists; its content names it, not its date.

    Args:
        storage: The table.
        entry: Of schema.FILES.
    """
    version = f"{_LISTED}{entry['sha256']}"
    return Span(storage.object_uri(entry["path"]), entry["bytes"], version)


def iter_sources(spans: Iterable[Span]) -> Iterator[Source]:
    """Yield the spans in order with their objects open, fetching small objects ahead.

    Raises:
        SourceChangedError: An object is gone or differs from the version in its span.
        IntegrityError: So does a file that a manifest lists.
        StorageError: The store failed.
    """
    with ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="fetch") as pool:
        pending: deque[Future[Source]] = deque()
        try:
            for span in spans:
                pending.append(pool.submit(_open_source, span))
                if len(pending) > _FETCH_THREADS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _open_source(span: Span) -> Source:
    if span.version.startswith(_LISTED):
        return Source(span, io.BytesIO(_read_listed(span)))
    _check_unchanged(span)
    file = open_random_access(span)
    if span.size > _FETCH_WHOLE_BYTES:
        return Source(span, file)
    with file:
        data = read_exactly(file, span, 0, span.size)
    return Source(span, io.BytesIO(data))


def _read_listed(span: Span) -> memoryview:
    storage, name = parent_of(span.uri)
    entry = {"path": name, "sha256": span.version.removeprefix(_LISTED)}
    return memoryview(read_verified(storage, entry))


def open_random_access(span: Span) -> BinaryIO:
    """Open the object of a span; reading it raises StorageError, never a bare OSError.

    Parsers report damaged content as OSError, so failures of the store must look different.
    """
    try:
        return io.BufferedReader(_StoredFile(open_object(span.uri), span.uri), 2**20)
    except FileNotFoundError as error:
        raise _changed(span, "is gone") from error


def read_exactly(file: BinaryIO, span: Span, start: int, stop: int) -> bytes:
    """Return the bytes of a range that the plan says is there."""
    file.seek(start)
    data = file.read(stop - start)
    if len(data) < stop - start:
        raise _changed(span, f"ends at byte {start + len(data)}")
    return data


def _check_unchanged(span: Span) -> None:
    try:
        info = object_info(span.uri)
    except FileNotFoundError as error:
        raise _changed(span, "is gone") from error
    if (info.size, info.version) != (span.size, span.version):
        raise _changed(span, f"now has {info.size} bytes and version {info.version}")


def _changed(span: Span, what: str) -> SourceChangedError:
    return SourceChangedError(
        f"{span.uri} {what}; the plan was made from {span.size} bytes, version {span.version}. "
        "Inputs must not change while a job runs: start the job again, it keeps finished units"
    )


class _StoredFile(io.RawIOBase):
    """A stored object whose read errors are StorageErrors."""

    def __init__(self, file: BinaryIO, uri: str) -> None:
        self._file = file
        self._uri = uri

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]  # wants Buffer
        try:
            data = self._file.read(len(buffer))
        except OSError as error:
            raise StorageError(
                f"cannot read {self._uri}: {type(error).__name__}: {error}. Check that the "
                "endpoint answers; a rerun continues with the unfinished units"
            ) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

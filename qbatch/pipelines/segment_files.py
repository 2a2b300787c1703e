"""Files of numbered segments: what one process writes for each of many readers, as one object.

The segments one after the other, then for each its end and a digest, then their number. A reader
fetches its own segment with two small requests and checks it; the file appears whole.
"""

import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from qbatch.errors import IntegrityError
from qbatch.storage import Storage

_ENTRY_BYTES = 16
_COUNT_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Where some bytes of a file lie, and what they must be."""

    path: str
    start: int
    stop: int
    digest: int


def write_segments(storage: Storage, path: str, segments: Iterable[bytes]) -> list[Segment]:
    """Make a file of ``segments`` appear whole, one in memory at a time; return where they lie."""
    written: list[Segment] = []
    with tempfile.TemporaryDirectory(prefix="qbatch-segments-") as directory:
        local = Path(directory, "segments")
        stop = 0
        with local.open("wb") as file:
            for data in segments:
                start, stop = stop, stop + len(data)
                written.append(Segment(path=path, start=start, stop=stop, digest=_digest(data)))
                file.write(data)
            entries = [(segment.stop, segment.digest) for segment in written]
            file.write(np.array(entries, "<u8").tobytes())
            file.write(len(written).to_bytes(_COUNT_BYTES, "little"))
        storage.upload(path, local)
    return written


def find_segment(storage: Storage, path: str, size: int, *, number: int, count: int) -> Segment:
    """Return where a segment lies.

    Args:
        storage: The table.
        path: The file.
        size: Of the file in bytes, as a listing says.
        number: From 0.
        count: How many segments there are.
    """
    first = size - _COUNT_BYTES - _ENTRY_BYTES * count
    before = first + _ENTRY_BYTES * max(0, number - 1)
    data = storage.read_range(path, before, first + _ENTRY_BYTES * (number + 1))
    entries = np.frombuffer(data, "<u8").reshape(-1, 2).tolist()
    start = entries[0][0] if number else 0
    return Segment(path=path, start=start, stop=entries[-1][0], digest=entries[-1][1])


def list_segments(storage: Storage, path: str, size: int) -> list[Segment]:
    """Return where all segments lie, in order; arguments as for ``find_segment``."""
    end = size - _COUNT_BYTES
    count = int.from_bytes(storage.read_range(path, end, size), "little")
    data = storage.read_range(path, end - _ENTRY_BYTES * count, end)
    entries = np.frombuffer(data, "<u8").reshape(-1, 2).tolist()
    starts = [0, *(stop for stop, _ in entries)]
    return [
        Segment(path=path, start=start, stop=stop, digest=digest)
        for start, (stop, digest) in zip(starts, entries, strict=False)
    ]


def read_segment(storage: Storage, segment: Segment) -> bytes:
    """Return the bytes of a segment.

    Raises:
        IntegrityError: They are not those that were written.
    """
    data = storage.read_range(segment.path, segment.start, segment.stop)
    if len(data) != segment.stop - segment.start or _digest(data) != segment.digest:
        raise IntegrityError(
            f"bytes {segment.start} to {segment.stop} of {storage.object_uri(segment.path)} are "
            "damaged; delete the object and run the job again to remake it"
        )
    return data


def table_bytes(table: pa.Table) -> bytes:
    """Return a table as a compressed Arrow stream."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def table_of(data: bytes) -> pa.Table:
    """Return the table that ``table_bytes`` wrote."""
    return pa.ipc.open_stream(pa.BufferReader(data)).read_all()


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
